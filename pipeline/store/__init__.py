"""The content-addressed store of results, and the storage below it."""
