"""How good samples are: distances, adherence to conditions, diversity, reconstruction."""
