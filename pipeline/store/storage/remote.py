"""Storage through fsspec: S3 and other object stores.

Temporary failures (a 5xx, too many requests, a time-out, a lost connection) are retried with
growing pauses: for two minutes (`FLS_PATIENCE_S`) if the storage has answered before, else for ten
seconds, because its address may be wrong. A request to S3 times out after 5 s to connect or 20 s
without an answer, and botocore makes each request twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

from pipeline.base.errors import (
    BadInput,
    StorageUnavailable,
    StorageUnsupported,
    StoreError,
    nearest,
)
from pipeline.base.names import require_inside
from pipeline.base.private import is_private, make_private, private_place
from pipeline.base.secrets import redact
from pipeline.store.cache import Cache, folder_bytes, is_locked
from pipeline.store.storage.base import (
    AbstractStorage,
    Leftover,
    StoredFile,
    list_files,
    patience_s,
)

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0

_S3_SCHEMES = {"s3", "s3a"}
_S3_REQUESTS = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"mode": "standard", "total_max_attempts": 2},
}
# Names of the time of writing in the file systems of fsspec.
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_BUSY = {408, 409, 425, 429}  # temporary client errors (HTTP 4xx)
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}

_WORK = "work-"
_UNHELD_S = 60.0  # a workspace is locked shortly after its creation
_locks: dict[Path, int] = {}  # workspace -> open folder, locked by this process

Answer = TypeVar("Answer")


class RemoteStorage(AbstractStorage):
    """A file system of fsspec, with scratch space in the local temporary folder."""

    at_once: ClassVar[int] = 16

    def __init__(self, url: str):
        self.url = url
        self._is_s3 = url.partition("://")[0] in _S3_SCHEMES
        options: dict[str, Any] = {"config_kwargs": _S3_REQUESTS} if self._is_s3 else {}
        self.fs, self.root = _file_system(url, options)
        if self._is_s3:
            self.fs.retries = 1  # botocore and this class retry already
        self.root = self.root.rstrip("/")
        digest = hashlib.sha256(url.encode()).hexdigest()[:12]
        self.scratch = private_place(digest)
        self._cache = Cache(self.scratch / "copies")
        self._answered = False

    def read(self, path: str) -> bytes:
        """See `AbstractStorage.read`."""
        full = self._full(path)
        # Without this option, each read first asks S3 for the size.
        options = {"max_concurrency": 1} if self._is_s3 else {}
        return self._patiently("read", path, lambda: self.fs.cat_file(full, **options))

    def write(self, path: str, data: bytes) -> None:
        """See `AbstractStorage.write`."""
        self._pipe(path, data, "overwrite")

    def create(self, path: str, data: bytes) -> bool:
        """See `AbstractStorage.create`; on S3 a conditional put (`If-None-Match: *`)."""
        try:
            self._pipe(path, data, "create")
        except FileExistsError:
            return self.read(path) == data
        return True

    def names(self, path: str, beginning: str = "") -> list[str]:
        """See `AbstractStorage.names`; S3 itself filters by `beginning`."""
        full = self._full(path)
        try:
            if beginning and self._is_s3:
                inside = self._patiently("list", path, lambda: self.fs.find(full, prefix=beginning))
                return sorted({name.partition(f"{full}/")[2].partition("/")[0] for name in inside})
            found = self._patiently("list", path, lambda: self.fs.ls(full, detail=False))
        except FileNotFoundError:
            return []
        names = {name.rstrip("/").rpartition("/")[2] for name in found} - {""}
        return sorted(name for name in names if name.startswith(beginning))

    def files(self, path: str) -> list[StoredFile]:
        """See `AbstractStorage.files`."""
        root = self._full(path) if path else self.root
        try:
            found = self._patiently("list", path, lambda: self.fs.find(root, detail=True))
            if root in found:
                found[root] = self._patiently("list", path, lambda: self.fs.info(root))
        except FileNotFoundError:
            return []
        start = len(self.fs._strip_protocol(self.root).rstrip("/")) + 1
        return [
            StoredFile(name[start:], info["size"], self._written(info))
            for name, info in sorted(found.items())
        ]

    def open(self, path: str) -> BinaryIO:
        """See `AbstractStorage.open`."""
        full = self._full(path)
        return self._patiently("read", path, lambda: self.fs.open(full, "rb"))

    def remove(self, path: str) -> None:
        """See `AbstractStorage.remove`."""
        full = self._full(path)
        try:
            self._patiently("delete", path, lambda: self.fs.rm(full, recursive=True))
        except FileNotFoundError:
            return

    def remove_files(self, paths: Sequence[str]) -> None:
        """See `AbstractStorage.remove_files`; on S3 a thousand with each request."""
        full = [self._full(path) for path in paths]
        if self._is_s3:  # a missing file is no error there
            self._patiently("delete", f"{len(full)} files", lambda: self.fs.rm(full))
        else:
            super().remove_files(paths)

    def move(self, source: str, target: str) -> None:
        """See `AbstractStorage.move`; an interruption leaves files in both folders."""
        old, new = self._full(source), self._full(target)

        def move() -> None:
            stored = self._find(source)
            moved = [f"{new}/{name}" for name in stored]
            copies = [f"{old}/{name}" for name in stored]
            if stored:
                self._write("write", target, moved, lambda: self.fs.copy(copies, moved))
                self.fs.rm(copies)

        self._patiently("move", source, move)

    def require_writable(self, *paths: str) -> None:
        """See `AbstractStorage.require_writable`; the server checks each request instead."""

    def workspace(self, path: str) -> Path:
        """See `AbstractStorage.workspace`."""
        make_private(self.scratch)
        for left in self._left_here():
            left.discard()
        folder = Path(tempfile.mkdtemp(dir=self.scratch, prefix=_WORK))
        _locks[folder] = os.open(folder, os.O_RDONLY)
        fcntl.flock(_locks[folder], fcntl.LOCK_EX)
        return folder

    def release(self, workspace: Path) -> None:
        """See `AbstractStorage.release`."""
        shutil.rmtree(workspace, ignore_errors=True)
        if workspace in _locks:
            os.close(_locks.pop(workspace))

    def leftovers(self) -> list[Leftover]:
        """See `AbstractStorage.leftovers`: workspaces on this machine, and partial uploads."""
        return [*self._left_here(), *self._left_there()]

    def _left_here(self) -> Iterator[Leftover]:
        """Yield the workspaces that no process holds; a new one may not be locked yet."""
        if not is_private(self.scratch.parent) or not is_private(self.scratch):
            return
        for folder in self.scratch.glob(f"{_WORK}*"):
            try:
                written = folder.stat().st_mtime
                held = time.time() - written < _UNHELD_S or is_locked(folder)
            except FileNotFoundError:  # released, or deleted by another process
                continue
            if not held:
                discard = partial(shutil.rmtree, folder, ignore_errors=True)
                yield Leftover(str(folder), folder_bytes(folder), written, discard)

    def _left_there(self) -> Iterator[Leftover]:
        """Yield partial uploads to S3, up to a thousand; none if the server does not list them."""
        if not self._is_s3:
            return
        bucket, _, folder = self.root.partition("/")
        here = f"{folder}/".lstrip("/")
        try:
            found = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=here)
        except Exception:  # `files` asks the same server and reports its errors
            return
        for upload in found.get("Uploads", []):
            request = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            discard = partial(self._abort, request)
            began = upload["Initiated"].timestamp()
            yield Leftover(upload["Key"].removeprefix(here), 0, began, discard)

    def save(self, folder: Path, path: str) -> None:
        """See `AbstractStorage.save`."""
        target, files = self._full(path), list_files(folder)
        names = [require_inside(file.relative_to(folder).as_posix()) for file in files]
        stored = [f"{target}/{name}" for name in names]
        if files:
            self._write("write", path, stored, lambda: self.fs.put(list(map(str, files)), stored))

    def save_file(self, file: Path, path: str) -> None:
        """See `AbstractStorage.save_file`."""
        self.write(path, file.read_bytes())

    def load(self, path: str, folder: Path) -> None:
        """See `AbstractStorage.load`."""
        names = self._find(path)
        folder.mkdir(parents=True)
        copies = [folder / name for name in names]
        for copy in copies:
            copy.parent.mkdir(parents=True, exist_ok=True)
        stored = [f"{self._full(path)}/{name}" for name in names]
        if stored:
            self._patiently("read", path, lambda: self.fs.get(stored, list(map(str, copies))))

    def local(self, path: str, *, fresh: bool = False) -> Path:
        """See `AbstractStorage.local`; returns a copy in the cache."""
        make_private(self.scratch)
        return self._cache.get(
            require_inside(path), lambda folder: self.load(path, folder), fresh=fresh
        )

    def _find(self, path: str) -> list[str]:
        """Return the names of all files in a stored folder at any depth, relative to it."""
        root = self._full(path)
        stored = self._patiently("list", path, lambda: self.fs.find(root))
        return [require_inside(file[file.index(root) + len(root) + 1 :]) for file in stored]

    def _pipe(self, path: str, data: bytes, mode: str) -> None:
        full = self._full(path)
        self._write("write", path, [full], lambda: self.fs.pipe_file(full, data, mode=mode))

    def _write(self, verb: str, path: str, files: Iterable[str], write: Callable[[], Any]) -> None:
        # Makes missing folders, but not on S3: that could create a bucket with a mistyped name.
        try:
            self._patiently(verb, path, write)
        except FileNotFoundError:
            if self._is_s3:
                raise
            for folder in {file.rpartition("/")[0] for file in files}:
                self.fs.makedirs(folder, exist_ok=True)
            self._patiently(verb, path, write)

    def _abort(self, request: Mapping[str, str]) -> None:

        def abort() -> None:
            try:
                self.fs.call_s3("abort_multipart_upload", **request)
            except Exception as error:
                if _answer_of(error)[0] != "NoSuchUpload" and not isinstance(
                    error, FileNotFoundError
                ):
                    raise

        self._patiently("delete the parts of", request["Key"], abort)

    def _written(self, info: Mapping[str, Any]) -> float:
        for name in _TIMES:
            found = info.get(name)
            if isinstance(found, datetime):
                return found.timestamp()
            if isinstance(found, int | float):
                return float(found)
        raise StorageUnsupported(
            f"{self.root}: {type(self.fs).__name__} has no times of writing, so files in use "
            "cannot be distinguished from old ones; use a file system that has"
        )

    def _full(self, path: str) -> str:
        return f"{self.root}/{require_inside(path)}"

    def _patiently(self, verb: str, path: str, request: Callable[[], Answer]) -> Answer:
        # Repeats a request while it fails temporarily, see `_judge`, and the patience lasts.
        began = time.monotonic()
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                answer = request()
                self._answered = True
                return answer
            except Exception as error:  # each file system raises its own
                what = f"{self.url}: cannot {verb} {path}"
                self._judge(error, what)
                waited_s = time.monotonic() - began
                if waited_s + pause_s > patience_s(self._answered):
                    raise StorageUnavailable(
                        f"{what}: {_reason(error)} (tried for {waited_s:.0f} s). Is the storage "
                        "up, and is its address right (for S3: AWS_ENDPOINT_URL)?"
                    ) from error
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads the load
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _judge(self, error: Exception, what: str) -> None:
        # Raises permanent errors, and returns for temporary ones.
        code, status = _answer_of(error)
        if code == "NoSuchBucket":
            raise StoreError(
                f"{what}: there is no such bucket. Make it, or correct `storage:`."
            ) from error
        if isinstance(error, FileExistsError) or status == 412:
            self._answered = True
            raise FileExistsError(what) from error
        if isinstance(error, FileNotFoundError):
            self._answered = True
            raise FileNotFoundError(what) from error
        if isinstance(error, (NotImplementedError, TypeError, ValueError)):
            raise error  # independent of the storage's state
        if type(error).__name__ in _NO_CREDENTIALS:
            raise StoreError(
                f"{what}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "another of the ways that AWS knows."
            ) from error
        if isinstance(error, PermissionError) or status in {401, 403}:
            raise StoreError(
                f"{what}: access denied ({_reason(error)}). Check the credentials and their "
                "permissions: listing, reading, writing and deleting."
            ) from error
        if status is not None and 400 <= status < 500 and status not in _BUSY:
            raise StoreError(f"{what}: {_reason(error)}.") from error


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the URL's path in it.

    Raises:
        BadInput: the URL is unknown or invalid, or its package is missing.
        StorageUnavailable: the file system cannot connect.
    """
    import fsspec.core  # slow to import
    from fsspec.registry import known_implementations

    scheme = url.partition("://")[0].rpartition("::")[2]
    if scheme not in {*known_implementations, *fsspec.available_protocols()}:
        raise BadInput(
            f"storage: {redact(url)}: unknown scheme {scheme!r}"
            f"{nearest(scheme, known_implementations)}; expected a folder, or a URL that fsspec "
            "knows, such as s3://bucket/folder."
        )
    try:
        file_system, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        return file_system, path
    except ImportError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        missing = f": no module named {cause.name!r}" if cause.name else ""
        raise BadInput(
            f"storage: {redact(url)} needs a package that is not installed{missing} "
            f"({_reason(error)}). Install it wherever this runs, on all nodes of a cluster too."
        ) from error
    except OSError as error:
        raise StorageUnavailable(f"{redact(url)}: cannot connect: {_first_line(error)}.") from error
    except Exception as error:  # each file system raises its own
        raise BadInput(f"storage: {redact(url)} cannot be used: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return _reason(error).partition("\n")[0]


def _answer_of(error: Exception) -> tuple[str | None, int | None]:
    """Return S3's error code and HTTP status; None each if an exception has no answer."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            about = response.get("ResponseMetadata", {})
            return response.get("Error", {}).get("Code"), about.get("HTTPStatusCode")
        cause = cause.__cause__
    return None, None


def _reason(error: Exception) -> str:
    """Return an exception's text, redacted."""
    text: str = redact(str(error).rstrip(".") or type(error).__name__)
    return text
