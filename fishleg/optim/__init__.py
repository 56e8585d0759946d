"""The FishLeg optimiser: natural-gradient steps through a learned inverse Fisher."""

from fishleg.optim.fishleg import FishLeg

__all__ = ["FishLeg"]
