"""How good are the pictures: feature spaces, distances, adherence."""
