"""What every storage offers: a tree of files, written whole, and created at most once."""

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

FOREIGN = frozenset({".DS_Store"})  # no part of any result, wherever it lies
_FIRST_PATIENCE_S = 10.0  # for a storage that has never answered: perhaps its address is wrong
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
# What a disk or a file server may get over; all else is raised at once.
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
    """A file as a listing shows it: its path, its size, and the Unix time of its last write.

    A link to a folder is listed as a file, too, and what lies behind it is not.
    """

    path: str
    bytes: int
    time: float
    leads_on: bool = False  # whether it is such a link


@dataclass(frozen=True)
class Leftover:
    """What a killed process left where no listing shows it.

    Attributes:
        path: where: in the storage, or an absolute one on this machine.
        bytes: its size as far as it is known.
        time: Unix time of the last write that is known.
        discard: deletes it.
    """

    path: str
    bytes: int
    time: float
    discard: Callable[[], object]


class AbstractStorage(ABC):
    """A tree of files.

    Where the storage cannot be reached, is full or refuses, methods raise `StorageUnavailable`; for
    a path that is none inside the storage, `StoreError`.

    Attributes:
        at_once: how many requests are worth making at the same time.
    """

    at_once: ClassVar[int] = 1

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return a file's content; FileNotFoundError if there is none."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a file, whole, in place of any that is there."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write a file, whole, only if there is none; tell whether this call did.

        A file that holds just `data` counts as this call's: perhaps it was, and the answer got
        lost. Where it matters who was first, `data` is therefore to be unlike anyone else's.
        """

    @abstractmethod
    def names(self, path: str, beginning: str = "") -> list[str]:
        """Return the sorted names in a folder with a beginning; none if there is no such folder.

        Cost: that of listing the folder; on S3, with a beginning, that of what is found.
        """

    @abstractmethod
    def files(self, path: str) -> list[StoredFile]:
        """Return the file at `path`, or all files in that folder at any depth, sorted by path.

        Also those that `names` hides. The storage as a whole has the path "".
        """

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """Open a file to read it in pieces, from the storage itself; the caller closes it."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete a file, or a folder with all in it, if it is there."""

    @abstractmethod
    def remove_files(self, paths: Sequence[str]) -> None:
        """Delete files, those that are there."""

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Rename a folder."""

    @abstractmethod
    def require_writable(self, *paths: str) -> None:
        """Refuse folders of others that this user may not write in, where there are such.

        Args:
            paths: of folders; the storage as a whole is looked at, too.
        """

    @abstractmethod
    def workspace(self, path: str) -> Path:
        """Return an existing local folder to prepare the stored folder `path` in."""

    @abstractmethod
    def release(self, workspace: Path) -> None:
        """Say that a workspace is needed no more."""

    def leftovers(self) -> list[Leftover]:
        """Return what killed processes left here, beside what `files` shows; mostly nothing."""
        return []

    @abstractmethod
    def save(self, folder: Path, path: str) -> None:
        """Store a local folder as `path`; nothing to do if it is already there."""

    @abstractmethod
    def save_file(self, file: Path, path: str) -> None:
        """Store a file of a workspace as `path`, in place of any that is there.

        Nothing to do if it is already there; unlike `save` this does not wait for the disk.
        """

    @abstractmethod
    def load(self, path: str, folder: Path) -> None:
        """Copy the stored folder `path` to the local `folder`, which must not exist yet."""

    @abstractmethod
    def local(self, path: str, *, fresh: bool = False) -> Path:
        """Return a local folder with what the stored folder `path` holds, to be read only.

        It is there as long as this object is, and may be damaged: its user checks it.

        Args:
            path: the stored folder.
            fresh: ask the storage itself rather than a copy made earlier.
        """


def patience_s(answered: bool = True) -> float:
    """Return how long a storage is waited for, that has `answered` before or has not."""
    most_s = float(PATIENCE_S.read())
    return most_s if answered else min(most_s, _FIRST_PATIENCE_S)


def retry(request: Callable[[], _Answer], limit_s: float) -> _Answer:
    """Return the answer to a request, made again while a disk or a file server has a bad moment.

    It must begin again each time: what an fsync has failed on may be lost, and the next fsync does
    not say so.

    Raises:
        OSError: it did not pass in time, or is of another kind.
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
    """Return all files in a folder and in those below it, sorted; none if there is no such folder.

    Those that file managers leave behind (`FOREIGN`) are passed over.

    Raises:
        StoreError: there is something else, such as a symbolic link, which may lead anywhere.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(
                f"{path} is neither a file nor a folder, but a link or a device: not stored, and "
                "not read. Copy what it stands for."
            )
        if path.is_file() and path.name not in FOREIGN:
            found.append(path)
    return found
