"""What the library covers: every layer of torch.nn with parameters, torchvision's classifiers.

`python -m tests.coverage` measures all of it and writes docs/coverage.md.
"""
