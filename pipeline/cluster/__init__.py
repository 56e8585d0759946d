"""What brings a folder to a cluster: packing, variables and submission."""
