"""The science as pipeline steps; catalogue.py declares them all."""
