"""A survey of a store: its files by key, run and generation, and foreign files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.base.errors import StoreError
from pipeline.base.names import require_inside
from pipeline.store.layout import find_temporary, parse
from pipeline.store.storage.base import StoredFile
from pipeline.store.store import Store

GRACE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The rule for keeping runs, and the grace period of written files.

    A run is dropped if all given limits drop it; without limits, all runs are kept. Live runs and
    runs that are not completely tracked are always kept.

    Attributes:
        keep_runs: number of newest runs to keep, or None.
        older_than_s: runs that began within this number of seconds are kept, or None.
        grace_s: the grace period.
    """

    keep_runs: int | None = None
    older_than_s: float | None = None
    grace_s: float = GRACE_S


class Survey:
    """A listing of a whole store.

    Attributes:
        store: the store.
        retention: the rule for keeping runs.
        now: Unix time by the storage's clock.
        folders: first two parts of paths -> files below them.
        temporary: path of an unfinished write or deletion -> its files.
        strange: paths of foreign files.
    """

    def __init__(self, store: Store, retention: Retention):
        self.store = store
        self.retention = retention
        self.now = store.now()
        self.folders: dict[tuple[str, str], list[StoredFile]] = defaultdict(list)
        self.temporary: dict[str, list[StoredFile]] = defaultdict(list)
        self.strange: list[str] = []
        for file in store.storage.files(""):
            if file.leads_on or not _is_inside(file.path):
                self.strange.append(file.path)
            elif name := find_temporary(file.path):
                self.temporary[name].append(file)
            elif (place := parse(file.path)) is None:
                self.strange.append(file.path)
            else:
                self.folders[place.folder].append(file)

    def is_old(self, files: Iterable[StoredFile]) -> bool:
        """Tell whether no file was written within the grace period."""
        return self.now - newest(files) >= self.retention.grace_s


def newest(files: Iterable[StoredFile]) -> float:
    """Return the Unix time of the last write; 0 without files."""
    return max((file.time for file in files), default=0.0)


def _is_inside(path: str) -> bool:
    try:
        require_inside(path)
    except StoreError:
        return False
    return True
