"""A cache of stored folders on the local disk, shared by all processes of a user on a machine.

    <folder>/lock                   held briefly to mark or delete copies
    <folder>/users/<user>           locked while this user of the cache lives
    <folder>/copies/<id>/copy/      a copy, created whole by a rename
    <folder>/copies/<id>/part-*     a copy in the making; `old-*` is a replaced copy
    <folder>/copies/<id>/<user>     marks a user of the copy; the folder's time is the last use

A lock ends with its process, so copies in use stay and those of killed processes are deleted.
The cache does not check copies: the caller compares them with the manifest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.base.variables import CACHE_BYTES


class Cache:
    """Local copies of stored folders; those that this object returned stay while it lives.

    Args:
        folder: the cache's folder; created on demand.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._copies = folder / "copies"
        self._users = folder / "users"
        self._user: str | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_user": None}  # a lock belongs to a process

    def get(self, name: str, fill: Callable[[Path], None], *, fresh: bool = False) -> Path:
        """Return the local copy of a folder; of two concurrent copies the first counts.

        Args:
            name: of the stored folder.
            fill: copies the folder to a path that does not exist yet.
            fresh: replace an existing copy.

        Raises:
            OSError: the disk is full, or broken.

        Cost: none if a copy exists; else that of `fill`, and a walk over all copies.
        """
        place = self._copies / hashlib.sha256(name.encode()).hexdigest()[:32]
        self._mark(place)
        copy = place / "copy"
        if fresh:
            _discard(copy)
        if not copy.exists():
            part = place / f"part-{uuid.uuid4().hex}"
            try:
                fill(part)
                part.rename(copy)
            except OSError:
                if not copy.exists():  # else another process was faster
                    raise
            finally:
                shutil.rmtree(part, ignore_errors=True)
            self._shrink()
        return copy

    def _mark(self, place: Path) -> None:
        """Mark a place as used by this object."""
        self._users.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            if self._user is None:
                self._user = uuid.uuid4().hex
                alive = os.open(self._users / self._user, os.O_CREAT | os.O_RDONLY, 0o600)
                fcntl.flock(alive, fcntl.LOCK_EX)
                weakref.finalize(self, os.close, alive)
            place.mkdir(parents=True, exist_ok=True)
            (place / self._user).touch()
            os.utime(place)

    def _shrink(self) -> None:
        """Delete unused copies, the longest unused first, until the cache is small enough."""
        with self._locked():
            living = {user.name for user in self._users.iterdir() if is_locked(user)}
            for user in self._users.iterdir():
                if user.name not in living:
                    user.unlink()
            places = sorted(self._copies.iterdir(), key=lambda place: place.stat().st_mtime)
            for place in places:
                if living.isdisjoint(os.listdir(place)):
                    for half in (*place.glob("part-*"), *place.glob("old-*")):
                        shutil.rmtree(half, ignore_errors=True)
            sizes = {place: folder_bytes(place) for place in places}
            excess = sum(sizes.values()) - CACHE_BYTES.read()
            for place in places:
                if excess > 0 and living.isdisjoint(os.listdir(place)):
                    shutil.rmtree(place)
                    excess -= sizes[place]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def is_locked(path: Path) -> bool:
    """Tell whether a living process holds the lock on a file or folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(opened)
    return False


def _discard(folder: Path) -> None:
    """Delete a folder; other processes see it whole or not at all."""
    aside = folder.with_name(f"old-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder; a file that vanishes counts 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
