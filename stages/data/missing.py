"""The error of missing data, and their download by one process at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.stage import StageError


class MissingData(StageError):
    """Data are missing; the message has the folder, the expected layout, and the remedy.

    Args:
        name: the data set, for people.
        root: the data folder that was searched.
        layout: the files expected under it, one line each.
        downloadable: whether `download: true` would fetch them.
    """

    def __init__(self, name: str, root: Path, layout: str, *, downloadable: bool = True):
        remedy = (
            "or let the stage fetch it: `download: true` among its params "
            "(--set STAGE.download=true)"
            if downloadable
            else "it cannot be downloaded automatically"
        )
        lines = "\n".join(f"    {line}" for line in layout.strip().splitlines())
        super().__init__(
            f"{name} is not in {root.absolute()}. Expected there:\n{lines}\n"
            f"Put it there, or set FISHLEG_DATA to the folder that has it; {remedy}."
        )


@contextmanager
def download_lock(root: Path) -> Iterator[None]:
    """Let one process at a time download into `root`; the others wait."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find_or_fetch(
    find: Callable[[], object | None], fetch: Callable[[], object], root: Path
) -> None:
    """Call `fetch`, under the lock of `root`, unless `find` finds the data already there."""
    if find() is None:
        with download_lock(root):
            if find() is None:
                fetch()
