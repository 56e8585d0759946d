"""What makes a cell's result, in a process of its own."""
