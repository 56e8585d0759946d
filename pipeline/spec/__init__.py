"""The pipeline file: read, checked, and expanded into cells."""
