"""What people read of an evaluation: reports, tables, plots, galleries."""
