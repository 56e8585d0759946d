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
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.errors import StorageUnsupported

_WHOLE = ".whole"


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
    def remove(self, path: str) -> None:
        """Delete a folder with all in it, if it is there."""

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

    def remove(self, path: str) -> None:
        """See `AbstractStorage.remove`; files that vanish meanwhile are as good as removed."""
        shutil.rmtree(self.root / path, ignore_errors=True)

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
