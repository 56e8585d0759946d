"""Keys of cells, and the plan of a run: what is there and what has to be made."""
