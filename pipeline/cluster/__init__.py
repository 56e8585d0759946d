"""Submission of a folder to a cluster: its packing and its variables."""
