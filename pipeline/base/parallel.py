"""Several requests to a slow storage at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Requests:
    """Asks the same of many things, in threads where that is worth it.

    The threads are daemons: a request that hangs holds no process back that is told to end.

    Args:
        at_once: how many requests are made at the same time, see `AbstractStorage.at_once`.
    """

    def __init__(self, at_once: int):
        self.at_once = at_once
        self._pool = ThreadPool(at_once) if at_once > 1 else None

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()

    def ask(
        self, question: Callable[[_Item], _Answer], items: Sequence[_Item]
    ) -> list[tuple[_Item, _Answer]]:
        """Return each item with the answer to it, in order; an error of any is raised."""
        if self._pool is None or len(items) < 2:
            return [(item, question(item)) for item in items]
        return list(zip(items, self._pool.map(question, items), strict=True))
