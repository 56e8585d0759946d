"""Mappings by group name whose values are computed when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

_Value = TypeVar("_Value")


class Lazy(Mapping[str, _Value]):
    """A mapping whose values are made when asked for, each time again, and not kept.

    A consumer that takes the groups one by one never holds all gradients of a batch.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], _Value]):
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> _Value:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
