"""Checks of a caller's arguments: a wrong type is refused in one sentence, before anything runs."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from fishleg.errors import WrongType


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Check that an argument is an instance of one of some classes.

    Args:
        name: of the argument, for the message.
        value: the argument.
        kinds: the classes.
        expected: the phrase of the message that describes them.

    Raises:
        WrongType: it is not.
    """
    if not isinstance(value, kinds):
        raise WrongType(f"{name}: expected {expected}, got {_show(value)}.")


def check_function(name: str, value: Any, expected: str) -> None:
    """Check that an argument can be called.

    Args:
        name: of the argument, for the message.
        value: the argument.
        expected: the phrase of the message that describes it.

    Raises:
        WrongType: it cannot.
    """
    if not callable(value):
        raise WrongType(f"{name}: expected {expected}, got {_show(value)}.")


def check_number(name: str, value: Any) -> None:
    """Check that an argument is a real number, and no truth value.

    Raises:
        WrongType: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WrongType(f"{name}: expected a number, got {_show(value)}.")


def check_integer(name: str, value: Any) -> None:
    """Check that an argument is an integer, and no truth value.

    Raises:
        WrongType: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise WrongType(f"{name}: expected an integer, got {_show(value)}.")


def check_names(name: str, value: Any) -> None:
    """Check that an argument is a sequence of strings, and no string itself.

    Raises:
        WrongType: it is not.
    """
    if isinstance(value, str):
        raise WrongType(f"{name}: expected a list of names, got {value!r}; write [{value!r}].")
    check_type(name, value, (list, tuple, set, frozenset), "a list of names")
    for one in value:
        check_type(f"a name of {name}", one, str, "a string")


def _show(value: Any) -> str:
    """Return the value where it is short, and its type."""
    text = repr(value)
    kind = type(value).__name__
    return f"{text} ({kind})" if len(text) <= 40 and "\n" not in text else f"a {kind}"
