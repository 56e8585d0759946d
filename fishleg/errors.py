"""The exception tree.

FishLegError
|-- ShapeMismatch        a tensor's shape, dtype or device is not the one that the callee needs
|-- WrongType            an argument is of another type than the callee takes
|-- UnknownName          a name is not among the choices
|-- InvalidOption        an option's value is out of range, or does not fit another option's
|   `-- WrongOptionType  it has the wrong type, and is a WrongType as well
|-- NotPositiveDefinite  a factor lost positive definiteness and could not be corrected
|-- CapacityExceeded     the job does not fit the available memory
|-- NotFitted            an estimator was used before `fit`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FishLegError(Exception):
    """Base of every error that this library raises on purpose."""


class ShapeMismatch(FishLegError, ValueError):
    """A tensor's shape, dtype or device is not the one that the callee needs."""


class WrongType(FishLegError, TypeError):
    """An argument is of another type than the callee takes."""


class UnknownName(FishLegError, ValueError):
    """A name is not among the choices; the message lists them, the nearest one first.

    Attributes:
        option: the kind of the name; of an option's value, the option.
        reason: the message.
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str]):
        known = sorted(choices)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        super().__init__(f"Unknown {kind} {name!r}{hint}. Known: {', '.join(known)}.")
        self.option = kind
        self.reason = f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}"


class InvalidOption(FishLegError, ValueError):
    """An option's value has the wrong type, is out of range, or does not fit another option.

    Attributes:
        option: the option's name.
        reason: the expected value, and the given one.
    """

    def __init__(self, option: str, reason: str):
        super().__init__(f"{option}: {reason.removesuffix('.')}.")
        self.option = option
        self.reason = reason


class WrongOptionType(InvalidOption, WrongType):
    """An option's value has another type than the option takes."""


class NotPositiveDefinite(FishLegError, ArithmeticError):
    """A factor lost positive definiteness and could not be corrected."""


class CapacityExceeded(FishLegError, MemoryError):
    """The job does not fit the available memory; the message names a job that would."""


class NotFitted(FishLegError, RuntimeError):
    """An estimator was used before `fit`."""
