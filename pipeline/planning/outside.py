"""Digests of external files and folders of data that cells read.

A folder's digest covers the names, sizes and contents of its files at any depth; links are
followed, and hidden files (`.name`) left out. Reading 100,000 images takes minutes, so the user's
cache keeps digests of files, valid for unchanged size, inode and times. A recently changed file is
read again next time, as its times may not show a further change.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from pipeline.base.console import RedactingConsole
from pipeline.base.errors import BadInput
from pipeline.base.private import make_private, private_place
from pipeline.base.variables import CACHE_HOME
from pipeline.spec.params import Marked, marked
from pipeline.stage import ExternalFile

_SETTLED_S = 10.0  # above the resolution of file times and the difference of clocks
_MUCH_BYTES = 1_000_000_000  # announced, as it takes long
_SAVE_EVERY_S = 30.0
_VERSION = 1

Signature = tuple[int, ...]


def files_of(params: BaseModel) -> dict[str, Path]:
    """Return parameter -> path of the file that it names."""
    found = [mark for mark in marked(params) if isinstance(mark.marker, ExternalFile)]
    return {name_of(mark): Path(mark.value) for mark in found}


def folders_of(params: BaseModel) -> dict[str, Path]:
    """Return parameter -> folder of the data that it names, without declared digests."""
    found = {}
    for mark in marked(params):
        entry = None if isinstance(mark.marker, ExternalFile) else mark.marker.find(mark.value)
        if entry and entry.folder and not entry.digest:
            found[name_of(mark)] = entry.folder(mark.value)
    return found


def name_of(mark: Marked) -> str:
    """Return the name of a marked parameter in ingredients, such as `teacher.path`."""
    return ".".join(map(str, mark.path))


@dataclass(frozen=True)
class Reading:
    """The content of a file or folder.

    Attributes:
        digest: hex sha256 of the content.
        state: digest of sizes and times, which changes with each write, even of equal content; it
            includes ctimes, which users cannot set, and no inodes, which change on file systems
            over object stores.
    """

    digest: str
    state: str


def read_file(path: Path) -> Reading:
    """Read a file, once.

    Raises:
        BadInput: it cannot be read.
    """
    state = state_of_file(path)
    try:
        with path.open("rb") as file:
            return Reading(hashlib.file_digest(file, "sha256").hexdigest(), state)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error}") from None


def state_of_file(path: Path) -> str:
    """Return the `state` of `read_file`, without reading.

    Raises:
        BadInput: it is inaccessible.
    """
    try:
        return repr(_sign(path)[_SIZE:])
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error}") from None


def read_folder(folder: Path) -> Reading:
    """Read a folder.

    Raises:
        BadInput: the folder or a file in it cannot be read.

    Cost: one stat of each file, and one read of new and changed ones.
    """
    found = _walk(folder)
    cache, content = _Cache(folder), hashlib.sha256()
    cache.announce(found)
    try:
        for name, signature in found:
            if not name.endswith(b"/"):
                digest = cache.digest(name, signature)
                content.update(name + b"\0" + f"{signature[_SIZE]} {digest}\n".encode())
    except OSError as error:
        raise BadInput(f"cannot read {folder}: {error}") from None
    cache.save()
    return Reading(content.hexdigest(), _state(found))


def state_of_folder(folder: Path) -> str:
    """Return the `state` of `read_folder`, without reading any file; may raise `BadInput`."""
    return _state(_walk(folder))


def _state(found: Iterable[tuple[bytes, Signature]]) -> str:
    digest = hashlib.sha256()
    for name, signature in found:
        digest.update(name + b"\0" + repr(signature[_SIZE:]).encode() + b"\n")
    return digest.hexdigest()


_SIZE = 1  # index of size in a signature; times follow


def _sign(path: Path | os.DirEntry[bytes]) -> Signature:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _walk(folder: Path) -> list[tuple[bytes, Signature]]:
    # Returns sorted relative names and signatures of files and folders (`name/`), without links to
    # a parent folder.
    root = os.fsencode(folder)
    found: list[tuple[bytes, Signature]] = []
    try:
        todo = [(b"", {os.stat(root).st_ino})]
        while todo:
            name, above = todo.pop()
            with os.scandir(os.path.join(root, name)) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    inside = name + entry.name
                    if not entry.is_dir():
                        found.append((inside, _sign(entry)))
                        continue
                    inode = entry.stat().st_ino
                    if inode not in above:
                        found.append((inside + b"/", _sign(entry)))
                        todo.append((inside + b"/", above | {inode}))
    except OSError as error:
        raise BadInput(f"cannot read {folder}: {error}") from None
    return sorted(found)


_Digests = dict[str, tuple[Signature, str]]  # relative path -> signature, sha256
_known: dict[Path, _Digests] = {}  # of this process, which may be unable to write the cache


class _Cache:
    """The user's cache of digests of one folder's files; a damaged cache counts as empty."""

    def __init__(self, folder: Path):
        self._folder = folder
        place = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:32]
        self._file = _cache_folder() / f"{place}.json"
        self._before = _known.get(self._file) or self._load()
        self._now: _Digests = {}
        self._news = False
        self._saved_s = time.monotonic()

    def announce(self, found: Iterable[tuple[bytes, Signature]]) -> None:
        """Announce the read of new files if it takes long."""
        new = sum(
            signature[_SIZE]
            for name, signature in found
            if not name.endswith(b"/") and self._find(name, signature) is None
        )
        if new > _MUCH_BYTES:
            RedactingConsole(stderr=True).print(
                f"Reading {new / 1e9:.0f} GB of {self._folder}, whose digest enters a key. Digests "
                f"are kept in {self._file.parent}: next time, only changed files are read.",
                soft_wrap=True,
            )

    def digest(self, name: bytes, signature: Signature) -> str:
        """Return the sha256 of a file; reads it if the signature is new."""
        found = self._find(name, signature)
        if found is None:
            with open(os.path.join(os.fsencode(self._folder), name), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            self._news = True
        if time.time() - max(signature[-2:]) / 1e9 > _SETTLED_S:
            self._now[os.fsdecode(name)] = signature, found
        if time.monotonic() - self._saved_s > _SAVE_EVERY_S:
            self._write({**self._before, **self._now})
        return found

    def save(self) -> None:
        """Write new digests to the cache; an unwritable cache lasts for this process."""
        if self._news:
            self._write(self._now)

    def _find(self, name: bytes, signature: Signature) -> str | None:
        known = self._before.get(os.fsdecode(name))
        return known[1] if known is not None and known[0] == signature else None

    def _write(self, files: _Digests) -> None:
        _known[self._file] = files
        self._saved_s = time.monotonic()
        part = self._file.with_name(f"{uuid.uuid4().hex}.part")
        with suppress(OSError):
            part.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.write_text(json.dumps({"version": _VERSION, "files": files}))
            part.replace(self._file)

    def _load(self) -> _Digests:
        try:
            document = json.loads(self._file.read_bytes())
            if document["version"] != _VERSION:
                return {}
            return {
                str(name): (tuple(map(int, signature)), str(digest))
                for name, (signature, digest) in document["files"].items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}


def _cache_folder() -> Path:
    base = CACHE_HOME.read() or os.path.expanduser("~/.cache")
    if os.path.isabs(base):
        return Path(base, "fishleg-surgeon", "folders")
    place = private_place("folders")  # for a user without a home
    with suppress(OSError):  # without a folder, nothing is kept
        make_private(place)
    return place
