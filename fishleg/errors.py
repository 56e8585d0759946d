"""The exception tree.

FishLegError
|-- ShapeMismatch        a tensor's shape, dtype or device is not what the callee needs
|-- WrongType            an argument is of another type than the callee takes
|-- UnknownName          a name that is not among the choices
|-- NotPositiveDefinite  a factor lost positive definiteness and could not be mended
|-- CapacityExceeded     the job does not fit the memory it was given
|-- NotFitted            an estimator was used before `fit`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FishLegError(Exception):
    """Base of every error that this library raises on purpose."""


class ShapeMismatch(FishLegError, ValueError):
    """A tensor's shape, dtype or device is not what the callee needs."""


class WrongType(FishLegError, TypeError):
    """An argument is of another type than the callee takes."""


class UnknownName(FishLegError, ValueError):
    """A name is not among the choices; the message lists them, the nearest one first."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]):
        known = sorted(choices)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        super().__init__(f"Unknown {kind} {name!r}{hint}. Known: {', '.join(known)}.")


class NotPositiveDefinite(FishLegError, ArithmeticError):
    """A factor lost positive definiteness and could not be mended."""


class CapacityExceeded(FishLegError, MemoryError):
    """The job does not fit the memory it was given; the message says what would."""


class NotFitted(FishLegError, RuntimeError):
    """An estimator was used before `fit`."""
