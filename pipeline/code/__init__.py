"""Digests of the code that a stage runs, and the provenance that a run records."""
