"""Parameters of all stages: types, defaults, ranges, and their meaning."""
