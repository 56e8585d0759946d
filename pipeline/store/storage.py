"""Where files live: a local folder, or (`pipeline.store.remote`) anything that fsspec reaches.

Paths are relative to the storage's root, with slashes, and never lead out of it. The one thing
asked of a storage beyond reading and writing is `create`: a file comes into being whole, and only
if there was none. A folder on a file system without hard links, and an object store without
conditional writes, are refused.

What `write`, `create` and `save` have returned from survives a power cut. On a folder that takes
an fsync of the file, then one of the folder that names it. Measured on a virtual disk with ext4 on
a busy machine, medians of 50 and single runs: 3 to 6 ms for a small file instead of 0.3 ms; 60 to
100 ms for outputs of 100 MB in ten files; 9 to 27 ms for a checkpoint of 1 MB in three.

Stages work on local folders. In local storage that is the final place, so nothing is copied; other
storage gets a scratch folder, whose files `save` uploads.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from stat import S_IMODE, S_ISDIR, S_ISLNK, S_ISREG
from typing import BinaryIO, ClassVar, TypeVar
from urllib.parse import urlsplit

from pipeline.base.errors import BadInput, StorageUnavailable, StorageUnsupported, StoreError
from pipeline.base.names import require_inside
from pipeline.base.secrets import redact
from pipeline.base.text import printable
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
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


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


def open_storage(url: str) -> AbstractStorage:
    """Return the storage at `url`: a folder, or any URL that fsspec knows.

    Folders never go through fsspec: its creating of a local file looks first and writes then, so
    that two processes may both believe to have been first.

    Raises:
        BadInput: it is none; or has a password, which would be shown and stored with every run.
    """
    scheme, colon, path = url.partition("://")
    if "\0" in url:
        raise BadInput(f"storage: {printable(url)} has a NUL in it, which no path may have.")
    if not colon:
        return LocalStorage(Path(url).absolute())
    if scheme in {"file", "local"}:
        return LocalStorage(Path(path).absolute())
    try:
        password = urlsplit(url).password
    except ValueError as error:
        raise BadInput(f"storage: {redact(url)} is no URL ({error}).") from error
    if password is not None:
        raise BadInput(
            f"storage: {redact(url)} has a password in it, which would be stored with every run; "
            "leave it out, and give it by the environment (for S3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)."
        )
    from pipeline.store.remote import RemoteStorage  # a command on a folder should not wait

    return RemoteStorage(url)


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


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; a pipe or a device, which might never answer, is refused.

    Raises:
        StoreError: it is such a thing.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(opened).st_mode
        if not S_ISREG(mode) and not S_ISDIR(mode):
            raise StoreError(f"{path} is no file, but a pipe or a device: not read. Delete it.")
        return os.fdopen(opened, "rb")  # which says what is wrong with a folder
    except BaseException:
        os.close(opened)
        raise


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names.

    Raises:
        OSError: it will not.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems know no fsync of folders: names are on their servers at once.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(opened)


class LocalStorage(AbstractStorage):
    """A folder of the local (or a shared) file system."""

    def __init__(self, root: Path):
        self.root = root
        self._answered = False

    def read(self, path: str) -> bytes:
        """See `AbstractStorage.read`."""

        def request() -> bytes:
            with open_regular(self._at(path)) as file:
                return file.read()

        return self._patiently(path, request)

    def write(self, path: str, data: bytes) -> None:
        """See `AbstractStorage.write`."""

        def request() -> None:
            with self._part(path, data) as part:
                part.replace(self._at(path))
                sync(part.parent)

        self._patiently(path, request)

    def create(self, path: str, data: bytes) -> bool:
        """See `AbstractStorage.create`; by a hard link, so that the file is whole at once.

        A file system without hard links is refused (`StorageUnsupported`).
        """

        def request() -> bool:
            with self._part(path, data) as part:
                try:
                    os.link(part, self._at(path))
                except FileExistsError:
                    with open_regular(self._at(path)) as file:
                        return file.read() == data
                except OSError as error:
                    if error.errno not in _NO_HARD_LINKS:
                        raise
                    raise StorageUnsupported(
                        f"{self.root}: cannot create a file exclusively, because the file system "
                        f"has no hard links ({error.strerror}); put 'storage:' on another one"
                    ) from error
                sync(part.parent)
                return True

        return self._patiently(path, request)

    def names(self, path: str, beginning: str = "") -> list[str]:
        """See `AbstractStorage.names`."""
        try:
            return sorted(
                name
                for name in self._patiently(path, lambda: os.listdir(self._at(path)))
                if name[0] != "." and name.startswith(beginning)
            )
        except FileNotFoundError:
            return []

    def files(self, path: str) -> list[StoredFile]:
        """See `AbstractStorage.files`; what vanishes meanwhile is left out."""
        start = self._at(path) if path else self.root
        below = [
            Path(above, name)
            for above, folders, names in os.walk(start)
            for name in [*names, *(one for one in folders if Path(above, one).is_symlink())]
        ]
        found = []
        for file in below or [start]:
            with suppress(FileNotFoundError):
                stat = self._patiently(path, file.lstat)
                if not S_ISDIR(stat.st_mode):
                    name = file.relative_to(self.root).as_posix()
                    leads_on = S_ISLNK(stat.st_mode) and file.is_dir()
                    found.append(StoredFile(name, stat.st_size, stat.st_mtime, leads_on))
        return sorted(found, key=attrgetter("path"))

    def open(self, path: str) -> BinaryIO:
        """See `AbstractStorage.open`."""
        return self._patiently(path, lambda: open_regular(self._at(path)))

    def remove(self, path: str) -> None:
        """See `AbstractStorage.remove`; renamed first, so that a kill leaves no half under a name.

        Files that vanish meanwhile are as good as removed.
        """
        target = self._at(path)

        def request() -> None:
            if not target.is_dir() or target.is_symlink():
                target.unlink(missing_ok=True)
                return
            gone = target.with_name(f".{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):
                target.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

        self._patiently(path, request)

    def remove_files(self, paths: Sequence[str]) -> None:
        """See `AbstractStorage.remove_files`."""
        for path in paths:
            self.remove(path)

    def move(self, source: str, target: str) -> None:
        """See `AbstractStorage.move`."""
        moved = self._patiently(source, lambda: self._at(source).rename(self._at(target)))
        self._patiently(source, lambda: sync(moved.parent))

    def require_writable(self, *paths: str) -> None:
        """See `AbstractStorage.require_writable`.

        Raises:
            StoreError: there is one.
        """
        for folder in (self.root, *map(self.root.joinpath, paths)):
            try:
                found = folder.stat()
            except OSError:  # it is not there, or what is wrong is said when it is used
                continue
            if found.st_uid != os.getuid() and not os.access(folder, os.W_OK | os.X_OK):
                raise StoreError(
                    f"{folder}: user {os.getuid()} may not write in it: it is user "
                    f"{found.st_uid}'s and group {found.st_gid}'s (mode "
                    f"{S_IMODE(found.st_mode):o}). {self._how_to_share()}"
                )

    def workspace(self, path: str) -> Path:
        """See `AbstractStorage.workspace`; it is the place itself."""
        folder = self._at(path)
        self._patiently(path, lambda: self._make(folder))
        return folder

    def release(self, workspace: Path) -> None:
        """See `AbstractStorage.release`; what was made stays."""

    def save(self, folder: Path, path: str) -> None:
        """See `AbstractStorage.save`; workspaces are in place, but perhaps not on the disk yet."""
        require_inside(path)
        with self._reporting(path):
            files = list_files(folder)
            for file in files:
                sync(file)
            above = {parent for file in [folder / "any", *files] for parent in file.parents}
            for parent in sorted(above, reverse=True):
                if parent.is_relative_to(self.root):
                    sync(parent)

    def save_file(self, file: Path, path: str) -> None:
        """See `AbstractStorage.save_file`; workspaces are in place."""

    def load(self, path: str, folder: Path) -> None:
        """See `AbstractStorage.load`; by hard links, since whole folders are never changed."""
        with self._reporting(path):
            stored = self._at(path)
            list_files(stored)
            shutil.copytree(stored, folder, copy_function=os.link)

    def local(self, path: str, *, fresh: bool = False) -> Path:
        """See `AbstractStorage.local`; it is the place itself."""
        return self._at(path)

    def _at(self, path: str) -> Path:
        """Return where a path is.

        Raises:
            StoreError: it is outside, perhaps by a symbolic link.
        """
        target = self.root / require_inside(path)
        root = os.path.realpath(self.root)
        if not Path(os.path.realpath(target)).is_relative_to(root):
            raise StoreError(
                f"{target} leads out of the storage by a symbolic link, and is not followed. "
                "Put what it leads to into its place."
            )
        return target

    def _how_to_share(self) -> str:
        return (
            "Users who share a store need a group, and each umask 002, or they keep each other "
            f"out. The one whose it is lets the group in: `chgrp -R GROUP {self.root}`, "
            f"`chmod -R g+rwX {self.root}` and `find {self.root} -type d -exec chmod g+s {{}} +`. "
            "Or use another `storage:`."
        )

    @contextmanager
    def _part(self, path: str, data: bytes) -> Iterator[Path]:
        """Yield a file with `data` beside where it is to go, which `names` does not show."""
        folder = self._at(path).parent
        self._make(folder)
        part = folder / f".{uuid.uuid4().hex}"
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield part
        finally:
            part.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        """Make a folder, and wait until the disk knows of it.

        The storage itself is made for this user alone: specs and uncommitted changes are in it. One
        that is to be shared is made, and given to a group, before.

        Raises:
            StorageUnavailable: there can be none.
        """
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        try:
            if self.root in missing:
                self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, FileExistsError) as error:  # where nothing can be made, a file
            raise StorageUnavailable(
                f"{folder} cannot be made: {error.strerror}. Expected `storage:` to be a "
                "folder, or one that can be made; choose another place."
            ) from error
        for one in reversed(missing):
            sync(one.parent)

    def _patiently(self, path: str, request: Callable[[], _Answer]) -> _Answer:
        """Return the answer to a request, see `retry`; one that fails is reported."""
        with self._reporting(path):
            answer = retry(request, patience_s(self._answered))
        self._answered = True
        return answer

    @contextmanager
    def _reporting(self, path: str) -> Iterator[None]:
        """Say what is wrong with the file system: full, read only, broken.

        Raises:
            StorageUnavailable: something is.
            StoreError: nothing is, but this user is kept out.
            OSError: nothing is, but a file is there or is not.
        """
        try:
            yield
        except PermissionError as error:
            raise StoreError(
                f"{self.root / path}: {error.strerror or error} for user {os.getuid()}. "
                f"{self._how_to_share()}"
            ) from error
        except OSError as error:
            if isinstance(error, (FileNotFoundError, FileExistsError, shutil.Error)):
                raise
            raise StorageUnavailable(f"{self.root / path}: {error.strerror or error}.") from error
