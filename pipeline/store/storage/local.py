"""Storage in a folder of the local, or a shared, file system."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from stat import S_IMODE, S_ISDIR, S_ISLNK, S_ISREG
from typing import BinaryIO, TypeVar

from pipeline.base.errors import StorageUnavailable, StorageUnsupported, StoreError
from pipeline.base.names import require_inside
from pipeline.store.storage.base import AbstractStorage, StoredFile, list_files, patience_s, retry

_Answer = TypeVar("_Answer")
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        StoreError: it is a pipe or a device, which may block forever.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(opened).st_mode
        if not S_ISREG(mode) and not S_ISDIR(mode):
            raise StoreError(f"{path} is no file, but a pipe or a device: not read. Delete it.")
        return os.fdopen(opened, "rb")  # raises for a folder
    except BaseException:
        os.close(opened)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk.

    Raises:
        OSError: the sync failed.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems have no fsync of folders: their servers store names at once.
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
        """See `AbstractStorage.create`; uses a hard link, else raises `StorageUnsupported`."""

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
        """See `AbstractStorage.files`; files that vanish meanwhile are left out."""
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
        """See `AbstractStorage.remove`; a folder is renamed first, so it vanishes as a whole."""
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

    def move(self, source: str, target: str) -> None:
        """See `AbstractStorage.move`."""
        moved = self._patiently(source, lambda: self._at(source).rename(self._at(target)))
        self._patiently(source, lambda: sync(moved.parent))

    def require_writable(self, *paths: str) -> None:
        """See `AbstractStorage.require_writable`.

        Raises:
            StoreError: a folder belongs to another user and is closed to this one.
        """
        for folder in (self.root, *map(self.root.joinpath, paths)):
            try:
                found = folder.stat()
            except OSError:  # missing, or its use will raise
                continue
            if found.st_uid != os.getuid() and not os.access(folder, os.W_OK | os.X_OK):
                raise StoreError(
                    f"{folder}: user {os.getuid()} may not write in it: it belongs to user "
                    f"{found.st_uid} and group {found.st_gid} (mode "
                    f"{S_IMODE(found.st_mode):o}). {self._how_to_share()}"
                )

    def workspace(self, path: str) -> Path:
        """See `AbstractStorage.workspace`; it is the stored folder itself."""
        folder = self._at(path)
        self._patiently(path, lambda: self._make(folder))
        return folder

    def release(self, workspace: Path) -> None:
        """See `AbstractStorage.release`; the folder stays."""

    def save(self, folder: Path, path: str) -> None:
        """See `AbstractStorage.save`; a workspace is in place, so this syncs it to the disk."""
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
        """See `AbstractStorage.save_file`; a workspace is in place."""

    def load(self, path: str, folder: Path) -> None:
        """See `AbstractStorage.load`; uses hard links, as stored folders never change."""
        with self._reporting(path):
            stored = self._at(path)
            list_files(stored)
            shutil.copytree(stored, folder, copy_function=os.link)

    def local(self, path: str, *, fresh: bool = False) -> Path:
        """See `AbstractStorage.local`; it is the stored folder itself."""
        return self._at(path)

    def _at(self, path: str) -> Path:
        target = self.root / require_inside(path)
        root = os.path.realpath(self.root)
        if not Path(os.path.realpath(target)).is_relative_to(root):
            raise StoreError(
                f"{target} leads out of the storage by a symbolic link, and is not followed. "
                "Replace the link by its target."
            )
        return target

    def _how_to_share(self) -> str:
        return (
            "Users who share a store need a common group and umask 002. The owner gives the "
            f"group access: `chgrp -R GROUP {self.root}`, "
            f"`chmod -R g+rwX {self.root}` and `find {self.root} -type d -exec chmod g+s {{}} +`. "
            "Or use another `storage:`."
        )

    @contextmanager
    def _part(self, path: str, data: bytes) -> Iterator[Path]:
        """Yield a hidden file with `data` in the folder of `path`."""
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
        # A new root is closed to others, because it holds specs and uncommitted changes. To share
        # one, create it and give it to a group first.
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        try:
            if self.root in missing:
                self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, FileExistsError) as error:  # unwritable, or a file
            raise StorageUnavailable(
                f"{folder} cannot be made: {error.strerror}. Expected `storage:` to be an existing "
                "folder, or one that can be made; choose another place."
            ) from error
        for one in reversed(missing):
            sync(one.parent)

    def _patiently(self, path: str, request: Callable[[], _Answer]) -> _Answer:
        """Return the answer to a request, see `retry` and `_reporting`."""
        with self._reporting(path):
            answer = retry(request, patience_s(self._answered))
        self._answered = True
        return answer

    @contextmanager
    def _reporting(self, path: str) -> Iterator[None]:
        # Turns an OSError into StoreError (no permission) or StorageUnavailable (full, read-only,
        # broken), except FileNotFoundError, FileExistsError and shutil.Error.
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
