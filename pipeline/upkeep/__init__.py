"""Maintenance of a store: gc, verify and rerun."""
