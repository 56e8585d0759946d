"""The runner: spec, graph, keys, store, executors, tracking and command line. Knows no science."""
