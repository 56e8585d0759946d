"""Keys of cells, and plans of runs."""
