"""What code a stage runs, as digests, and what a run records of it."""
