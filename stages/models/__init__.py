"""Networks by name. Each builder takes `num_classes` and its own options, and returns a module."""
