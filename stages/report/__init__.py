"""The comparison's table and picture."""
