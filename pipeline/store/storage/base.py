"""The interface of all storages: a tree of files with atomic writes and exclusive creation."""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, TypeVar

from pipeline.base.errors import StoreError
from pipeline.base.variables import PATIENCE_S

FOREIGN = frozenset({".DS_Store"})  # never part of a result
_FIRST_PATIENCE_S = 10.0  # before the first answer: the address may be wrong
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
# Errors of a disk or a file server that may pass; all others are raised at once.
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EHOSTDOWN,
    errno.EINTR,
    errno.EIO,
    errno.ENOSPC,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class StoredFile:
    """A listed file: its path, its size, and the Unix time of its last write.

    A link to a folder is listed as a file, without the files behind it.
    """

    path: str
    bytes: int
    time: float
    leads_on: bool = False  # whether it is a link to a folder


@dataclass(frozen=True)
class Leftover:
    """Data of a killed process that no listing shows.

    Attributes:
        path: in the storage, or absolute on this machine.
        bytes: its known size.
        time: Unix time of its last known write.
        discard: deletes it.
    """

    path: str
    bytes: int
    time: float
    discard: Callable[[], object]


class AbstractStorage(ABC):
    """A tree of files.

    Methods raise `StorageUnavailable` if the storage is out of reach, full or broken, and
    `StoreError` if it refuses or a path leads outside.

    Attributes:
        at_once: useful number of concurrent requests.
    """

    at_once: ClassVar[int] = 1

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return a file's content; FileNotFoundError without one."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file atomically."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write a file atomically if there is none; tell whether this call did.

        An existing file with equal `data` counts as this call's, whose answer may have been lost.
        Callers that race must therefore write different `data`.
        """

    @abstractmethod
    def names(self, path: str, beginning: str = "") -> list[str]:
        """Return the sorted names in a folder that start with `beginning`; none without a folder.

        Cost: that of listing the folder; on S3, that of listing the names found.
        """

    @abstractmethod
    def files(self, path: str) -> list[StoredFile]:
        """Return the file at `path`, or all files in that folder at any depth, sorted by path.

        The path "" is the whole storage. Files that `names` hides are included.
        """

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """Open a file for reading in pieces; the caller closes it."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete a file, or a folder with its content, if it exists."""

    def remove_files(self, paths: Sequence[str]) -> None:
        """Delete the files that exist."""
        for path in paths:
            self.remove(path)

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Rename a folder."""

    @abstractmethod
    def require_writable(self, *paths: str) -> None:
        """Check that this user may write in the storage and in folders of it, if they exist."""

    @abstractmethod
    def workspace(self, path: str) -> Path:
        """Return an existing local folder in which to prepare the stored folder `path`."""

    @abstractmethod
    def release(self, workspace: Path) -> None:
        """Release a workspace after use."""

    def leftovers(self) -> list[Leftover]:
        """Return data of killed processes that `files` does not list."""
        return []

    @abstractmethod
    def save(self, folder: Path, path: str) -> None:
        """Store a workspace or another local folder as `path`."""

    @abstractmethod
    def save_file(self, file: Path, path: str) -> None:
        """Store or replace a file of a workspace as `path`; does not wait for the disk."""

    @abstractmethod
    def load(self, path: str, folder: Path) -> None:
        """Copy the stored folder `path` to the local `folder`, which must not exist yet."""

    @abstractmethod
    def local(self, path: str, *, fresh: bool = False) -> Path:
        """Return a local, read-only folder with the content of the stored folder `path`.

        It exists as long as this object; the caller checks its content. With `fresh`, an earlier
        copy is replaced.
        """


def patience_s(answered: bool = True) -> float:
    """Return how long to wait for a storage that has answered before, or has not."""
    most_s = float(PATIENCE_S.read())
    return most_s if answered else min(most_s, _FIRST_PATIENCE_S)


def retry(request: Callable[[], _Answer], limit_s: float) -> _Answer:
    """Return the answer to a request, repeated while a disk or a file server fails temporarily.

    Each try must write all data again: after a failed fsync data may be lost, and the next fsync
    does not report that.

    Raises:
        OSError: the last error, or one that does not pass.
    """
    end_s, pause_s = time.monotonic() + limit_s, _FIRST_PAUSE_S
    while True:
        try:
            return request()
        except OSError as error:
            if error.errno not in _PASSING or time.monotonic() + pause_s > end_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def list_files(folder: Path) -> list[Path]:
    """Return all files in a folder at any depth, sorted, without `FOREIGN`; none without a folder.

    Raises:
        StoreError: the folder contains a link or a device.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(
                f"{path} is neither a file nor a folder, but a link or a device: not stored, and "
                "not read. Replace it by a copy."
            )
        if path.is_file() and path.name not in FOREIGN:
            found.append(path)
    return found
