"""A cache of stored folders on the local disk, shared by all processes of a user on a machine.

    <folder>/lock                   held for a moment while one marks or deletes
    <folder>/users/<user>           locked as long as this user of the cache lives
    <folder>/copies/<id>/copy/      a copy; comes into being by rename: it is whole or not there
    <folder>/copies/<id>/part-*     one in the making; `old-*` is one that a fresh one replaced
    <folder>/copies/<id>/<user>     says who uses it; the folder's time is that of the last use

A lock ends with its process, however that ends. So a copy in use is never deleted, and what a
killed process left behind is. Nothing here says that a copy is right: its user compares it with the
manifest, and asks for a fresh one if it differs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.base.variables import CACHE_BYTES


class Cache:
    """The copies that this object handed out stay until it is gone.

    Args:
        folder: where the copies are; made if need be.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._copies = folder / "copies"
        self._users = folder / "users"
        self._user: str | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_user": None}  # a lock belongs to a process

    def get(self, name: str, fill: Callable[[Path], None], *, fresh: bool = False) -> Path:
        """Return the local copy of a folder.

        Two processes may fill the same place at once; the first one's copy is taken.

        Args:
            name: of the stored folder.
            fill: makes the copy at the path it is given, which does not exist yet.
            fresh: make a new one in place of any that is there.

        Raises:
            OSError: the disk is full, or broken.

        Cost: nothing if there is a copy; else filling it, and a look at the size of all others.
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
                if not copy.exists():  # otherwise another process was quicker
                    raise
            finally:
                shutil.rmtree(part, ignore_errors=True)
            self._shrink()
        return copy

    def _mark(self, place: Path) -> None:
        """Note that this object uses a place, from now on."""
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
        """Delete what was used longest ago, and is not in use, until the rest is small enough."""
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
        """Keep all others from marking and deleting."""
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
    """Delete a folder that others may look for: they find it whole, or not at all."""
    aside = folder.with_name(f"old-{uuid.uuid4().hex}")
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total
