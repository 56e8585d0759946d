"""The science as pipeline steps; the package `catalogue` declares them all."""
