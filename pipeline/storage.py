"""Where files live: a local folder, or anything that fsspec reaches.

Paths are relative to the storage's root, with slashes. The one thing asked of a storage beyond
reading and writing is `create`: a file comes into being whole, and only if there was none. A folder
on a file system without hard links, and an object store without conditional writes, are refused.

Stages work on local folders. In local storage that is the final place, so nothing is copied; other
storage gets a scratch folder, whose files `save` uploads.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from stat import S_ISDIR
from typing import Any, BinaryIO

from pipeline.errors import StorageUnsupported

_WHOLE = ".whole"
# What the file systems behind fsspec call the time at which a file was written.
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class StoredFile:
    """A file as a listing shows it: its path, its size, and the Unix time of its last write."""

    path: str
    bytes: int
    time: float


class AbstractStorage(ABC):
    """A tree of files."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return a file's content; FileNotFoundError if there is none."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a file, whole, in place of any that is there."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write a file, whole, only if there is none; tell whether this call did."""

    @abstractmethod
    def names(self, path: str) -> list[str]:
        """Return the sorted names in a folder; none if there is no such folder."""

    @abstractmethod
    def files(self, path: str) -> list[StoredFile]:
        """Return the file at `path`, or all files in that folder at any depth, sorted by path.

        Also those that `names` hides.
        """

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """Open a file to read it in pieces, from the storage itself; the caller closes it."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete a file, or a folder with all in it, if it is there."""

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Rename a folder."""

    @abstractmethod
    def workspace(self, path: str) -> Path:
        """Return an existing local folder to prepare the stored folder `path` in."""

    @abstractmethod
    def release(self, workspace: Path) -> None:
        """Say that a workspace is needed no more."""

    @abstractmethod
    def save(self, folder: Path, path: str) -> None:
        """Store a local folder as `path`; nothing to do if it is already there."""

    @abstractmethod
    def saved(self, path: str) -> list[str]:
        """Return the sorted names of the folders in `path` that were saved whole."""

    @abstractmethod
    def load(self, path: str, folder: Path) -> None:
        """Copy the stored folder `path` to the local `folder`, which must not exist yet."""

    @abstractmethod
    def local(self, path: str, *, fresh: bool = False) -> Path:
        """Return a local folder with what the stored folder `path` holds, to be read only.

        Args:
            path: the stored folder.
            fresh: ask the storage itself rather than a copy made earlier.
        """


def open_storage(url: str) -> AbstractStorage:
    """Return the storage at `url`: a folder, or any URL that fsspec knows.

    Folders never go through fsspec: its creating of a local file looks first and writes then, so
    that two processes may both believe to have been first.
    """
    scheme, colon, path = url.partition("://")
    if not colon:
        return LocalStorage(Path(url).absolute())
    if scheme in {"file", "local"}:
        return LocalStorage(Path(path).absolute())
    return RemoteStorage(url)


class LocalStorage(AbstractStorage):
    """A folder of the local (or a shared) file system."""

    def __init__(self, root: Path):
        self.root = root

    def read(self, path: str) -> bytes:
        """See `AbstractStorage.read`."""
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """See `AbstractStorage.write`."""
        self._part(path, data).replace(self.root / path)

    def create(self, path: str, data: bytes) -> bool:
        """See `AbstractStorage.create`; by a hard link, so that the file is whole at once.

        Raises:
            StorageUnsupported: the file system has no hard links.
        """
        part = self._part(path, data)
        try:
            os.link(part, self.root / path)
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageUnsupported(
                f"{self.root}: cannot create a file exclusively, because the file system has no "
                f"hard links ({error.strerror}); put 'storage:' on another one"
            ) from error
        finally:
            part.unlink()
        return True

    def names(self, path: str) -> list[str]:
        """See `AbstractStorage.names`."""
        try:
            return sorted(name for name in os.listdir(self.root / path) if name[0] != ".")
        except FileNotFoundError:
            return []

    def files(self, path: str) -> list[StoredFile]:
        """See `AbstractStorage.files`; what vanishes meanwhile is left out."""
        below = [
            Path(folder, name) for folder, _, names in os.walk(self.root / path) for name in names
        ]
        found = []
        for file in below or [self.root / path]:
            with suppress(FileNotFoundError):
                stat = file.lstat()
                if not S_ISDIR(stat.st_mode):
                    name = file.relative_to(self.root).as_posix()
                    found.append(StoredFile(name, stat.st_size, stat.st_mtime))
        return sorted(found, key=attrgetter("path"))

    def open(self, path: str) -> BinaryIO:
        """See `AbstractStorage.open`."""
        return (self.root / path).open("rb")

    def remove(self, path: str) -> None:
        """See `AbstractStorage.remove`; renamed first, so that a kill leaves no half under a name.

        Files that vanish meanwhile are as good as removed.
        """
        target = self.root / path
        if not target.is_dir() or target.is_symlink():
            target.unlink(missing_ok=True)
            return
        gone = target.with_name(f".{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            target.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def move(self, source: str, target: str) -> None:
        """See `AbstractStorage.move`."""
        (self.root / source).rename(self.root / target)

    def workspace(self, path: str) -> Path:
        """See `AbstractStorage.workspace`; it is the place itself."""
        (self.root / path).mkdir(parents=True, exist_ok=True)
        return self.root / path

    def release(self, workspace: Path) -> None:
        """See `AbstractStorage.release`; what was made stays."""

    def save(self, folder: Path, path: str) -> None:
        """See `AbstractStorage.save`; workspaces are in place."""

    def saved(self, path: str) -> list[str]:
        """See `AbstractStorage.saved`; contexts rename a folder to its name when it is whole."""
        return [name for name in self.names(path) if name.isdigit()]

    def load(self, path: str, folder: Path) -> None:
        """See `AbstractStorage.load`; by hard links, since whole folders are never changed."""
        shutil.copytree(self.root / path, folder, copy_function=os.link)

    def local(self, path: str, *, fresh: bool = False) -> Path:
        """See `AbstractStorage.local`; it is the place itself."""
        return self.root / path

    def _part(self, path: str, data: bytes) -> Path:
        """Write `data` beside where it is to go, under a name that `names` does not show."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{uuid.uuid4().hex}")
        part.write_bytes(data)
        return part


class RemoteStorage(AbstractStorage):
    """Anything that fsspec reaches, with scratch space in the local temporary folder."""

    def __init__(self, url: str):
        import fsspec.core  # here, because a command on local storage should not wait for it

        self.fs, self.root = fsspec.core.url_to_fs(url)
        digest = hashlib.sha256(url.encode()).hexdigest()[:12]
        self.scratch = Path(tempfile.gettempdir()) / f"fls-{getpass.getuser()}" / digest

    def read(self, path: str) -> bytes:
        """See `AbstractStorage.read`."""
        return self.fs.cat_file(self._full(path))

    def write(self, path: str, data: bytes) -> None:
        """See `AbstractStorage.write`."""
        self._pipe(path, data, "overwrite")

    def create(self, path: str, data: bytes) -> bool:
        """See `AbstractStorage.create`."""
        try:
            self._pipe(path, data, "create")
        except FileExistsError:
            return False
        return True

    def names(self, path: str) -> list[str]:
        """See `AbstractStorage.names`."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self._full(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def files(self, path: str) -> list[StoredFile]:
        """See `AbstractStorage.files`."""
        self.fs.invalidate_cache()
        root = self._full(path).rstrip("/")
        try:
            found = self.fs.find(root, detail=True)
            if root in found:
                found[root] = self.fs.info(root)
        except FileNotFoundError:
            return []
        start = len(self.fs._strip_protocol(self.root).rstrip("/")) + 1
        return [
            StoredFile(name[start:], info["size"], self._written(info))
            for name, info in sorted(found.items())
        ]

    def open(self, path: str) -> BinaryIO:
        """See `AbstractStorage.open`."""
        return self.fs.open(self._full(path), "rb")

    def remove(self, path: str) -> None:
        """See `AbstractStorage.remove`."""
        try:
            self.fs.rm(self._full(path), recursive=True)
        except FileNotFoundError:
            return

    def move(self, source: str, target: str) -> None:
        """See `AbstractStorage.move`; file by file, so interrupted it leaves files in both."""
        self.fs.mv(self._full(source), self._full(target), recursive=True)

    def workspace(self, path: str) -> Path:
        """See `AbstractStorage.workspace`."""
        self.scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(tempfile.mkdtemp(dir=self.scratch, prefix="work-"))

    def release(self, workspace: Path) -> None:
        """See `AbstractStorage.release`."""
        shutil.rmtree(workspace, ignore_errors=True)

    def save(self, folder: Path, path: str) -> None:
        """See `AbstractStorage.save`; a marker tells when all is there."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if files:
            stored = [self._full(f"{path}/{file.relative_to(folder).as_posix()}") for file in files]
            self._with_folders(stored, lambda: self.fs.put(list(map(str, files)), stored))
        self.write(path + _WHOLE, b"")

    def saved(self, path: str) -> list[str]:
        """See `AbstractStorage.saved`."""
        names = self.names(path)
        return [name for name in names if name + _WHOLE in names]

    def load(self, path: str, folder: Path) -> None:
        """See `AbstractStorage.load`."""
        folder.mkdir(parents=True)
        root = self._full(path)
        stored = self.fs.find(root)
        copies = [folder / file[file.index(root) + len(root) + 1 :] for file in stored]
        for copy in copies:
            copy.parent.mkdir(parents=True, exist_ok=True)
        if stored:
            self.fs.get(stored, list(map(str, copies)))

    def local(self, path: str, *, fresh: bool = False) -> Path:
        """See `AbstractStorage.local`; a copy in the scratch space, kept for the next time."""
        copy = self.scratch / "copies" / path
        if fresh:
            shutil.rmtree(copy, ignore_errors=True)
        if not copy.exists():
            part = self.workspace(path)
            self.load(path, part / "copy")
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                (part / "copy").rename(copy)
            except OSError:  # another process was quicker; its copy is as good
                shutil.rmtree(part)
            else:
                part.rmdir()
        return copy

    def _pipe(self, path: str, data: bytes, mode: str) -> None:
        full = self._full(path)
        self._with_folders([full], lambda: self.fs.pipe_file(full, data, mode=mode))

    def _with_folders(self, files: Iterable[str], write: Callable[[], None]) -> None:
        """Call `write`; make the files' folders first if they are asked for.

        Object stores have none, and making sure of them would cost a request each time.
        """
        try:
            write()
        except FileNotFoundError:
            for folder in {file.rpartition("/")[0] for file in files}:
                self.fs.makedirs(folder, exist_ok=True)
            write()

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _written(self, info: Mapping[str, Any]) -> float:
        """Return the Unix time at which a listed file was written.

        Raises:
            StorageUnsupported: the file system does not tell.
        """
        for name in _TIMES:
            found = info.get(name)
            if isinstance(found, datetime):
                return found.timestamp()
            if isinstance(found, int | float):
                return float(found)
        raise StorageUnsupported(
            f"{self.root}: {type(self.fs).__name__} does not tell when files were written, so what "
            "is in use cannot be told from what is old; use a file system that does"
        )
