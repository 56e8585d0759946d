"""Concurrent requests to a slow storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Requests:
    """Calls a function on many items, in threads where the storage is slow.

    The threads are daemons, so a request that hangs does not delay the end of the process.

    Args:
        at_once: number of concurrent requests, see `AbstractStorage.at_once`.
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
        """Return each item with its answer, in order; raises the first error."""
        if self._pool is None or len(items) < 2:
            return [(item, question(item)) for item in items]
        return list(zip(items, self._pool.map(question, items), strict=True))
