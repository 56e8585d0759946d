"""Basics of the whole runner: errors, text, secrets, names and limits."""
