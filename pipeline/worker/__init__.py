"""The worker process that makes a cell's result."""
