"""The FishLeg optimiser: natural-gradient steps through a learned inverse Fisher."""

from fishleg.optim.natural_gradient import FishLeg

__all__ = ["FishLeg"]
