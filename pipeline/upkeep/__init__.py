"""What keeps a store in order: gc, verify and rerun."""
