"""Data sets: one file per source, all decoded into the arrays of `stages.data.dataset`."""
