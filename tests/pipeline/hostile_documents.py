"""What anybody who writes to a store can put into its documents, and a watch over what follows.

Documents are found by walking a store. A field is a place in one of them, at any depth; in lists,
and in mappings whose names are data (packages, digests), some entries stand for all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.store.checksum import lines_with_checksum, verified, verified_lines, with_checksum

Way = tuple[str | int, ...]
MISSING = object()
CANARY = "canary_module"
_ALIKE = 2  # of entries that are alike, so many stand for all
_NAME = re.compile(r"[a-z_]{1,20}")


@dataclass(frozen=True)
class Kind:
    """Documents of one kind.

    Attributes:
        name: what they are.
        pattern: of their paths within the store.
        readers: commands that read them.
        form: "document" (with a checksum), "lines" (likewise), "output" (plain, in a manifest), or
            "bytes".
    """

    name: str
    pattern: str
    readers: Sequence[str]
    form: str = "document"

    def fits(self, path: str) -> bool:
        """Tell whether a path within a store is of this kind."""
        return re.fullmatch(self.pattern, path) is not None


def read(kind: Kind, path: Path) -> Any:
    """Return what a document says."""
    data = path.read_bytes()
    if kind.form == "lines":
        return verified_lines(data)
    return json.loads(data) if kind.form == "output" else verified(data)


def write(kind: Kind, path: Path, document: Any) -> None:
    """Write a document with a valid checksum or digest, as any writer to the store can."""
    if kind.form == "lines":
        path.write_bytes(lines_with_checksum(document))
    elif kind.form == "document":
        path.write_bytes(with_checksum(document))
    else:
        data = json.dumps(document).encode()
        path.write_bytes(data)
        place = path.parents[4] / "manifest.json"
        manifest = verified(place.read_bytes())
        manifest["outputs"][path.parent.name][path.name] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
        }
        place.write_bytes(with_checksum(manifest))


def fields(value: Any, chance: random.Random, *at: str | int) -> Iterator[Way]:
    """Yield the way to each field of a document, from the outside inwards."""
    entries = list(value.items() if isinstance(value, dict) else enumerate(value))
    if _is_alike(value) and len(entries) > _ALIKE:
        entries = chance.sample(entries, _ALIKE)
    for name, inner in entries:
        yield *at, name
        if isinstance(inner, dict | list):
            yield from fields(inner, chance, *at, name)


def shape(document: Any, way: Way) -> Way:
    """Return a way in which a `#` stands for each entry of many that are alike."""
    found: list[str | int] = []
    for part in way:
        found.append("#" if _is_alike(document) else part)
        document = document[part]
    return (*found, type(document).__name__)


def _is_alike(value: Any) -> bool:
    """Tell whether the entries of a list or a mapping are alike, and their names only data."""
    if isinstance(value, list):
        return True
    nests = [set(inner) for inner in value.values() if isinstance(inner, dict)]
    if len(nests) == len(value) > 1 and all(one == nests[0] for one in nests):
        return True
    return not all(_NAME.fullmatch(name) for name in value)


def get(document: Any, way: Way) -> Any:
    """Return the value of a field."""
    for part in way:
        document = document[part]
    return document


def replaced(document: Any, way: Way, value: Any) -> Any:
    """Return a document with another value in one field, or without the field."""
    changed = copy.deepcopy(document)
    *above, last = way
    inner = get(changed, tuple(above))
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return changed


def wrong_types(value: Any) -> Any:
    """Return a value of another type than this one."""
    if isinstance(value, str | None):
        return -1
    return [] if isinstance(value, dict) else "x"


def mutations(value: Any, outside: Path, url: str, chance: random.Random) -> dict[str, Any]:
    """Return name -> what may stand in place of a value."""
    return {
        "wrong type": wrong_types(value),
        "null": None,
        "path upwards": "../../../outside/x",
        "absolute path": chance.choice((f"{outside}/x", f"sqlite:///{outside}/x.db")),
        "url": f"{url}/x",
        "code": chance.choice((CANARY, f"{CANARY}:load")),
        "huge number": chance.choice((10**400, -(10**30))),
        "long": "x" * 100_000,
        "deep": json.loads("[" * 250 + "]" * 250),
        "controls": "\x1b]0;owned\x07\n\x00",
        "surrogate": "\ud800",
        "missing": MISSING,
    }


# ------------------------------------------------------------------------------- the watch


@dataclass
class Watch:
    """Notes what a process does that nobody but the user may ask for.

    Attributes:
        roots: folders that may be written to.
        active: whether it notes anything now.
        found: what it noted.
    """

    roots: Sequence[str] = ()
    active: bool = False
    found: list[str] = field(default_factory=list)

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        """Note an audit event, if it is one of those."""
        if not self.active:
            return
        self.active = False
        try:
            self._note(event, given)
        finally:
            self.active = True

    def _note(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "import" and str(given[0]).startswith(CANARY):
            self.found.append(f"import {given[0]}")
        elif event == "open" and isinstance(given[0], str | bytes | os.PathLike):
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if given[2] & writes:
                self._require_inside(event, given[:1])
        elif event in _PATHS:
            paths, folders = _PATHS[event]
            beside = [f"/proc/self/fd/{given[at]}" if given[at] >= 0 else "" for at in folders]
            named = zip(given[:paths], beside or [""] * paths, strict=True)
            self._require_inside(event, (os.path.join(at, os.fsdecode(p)) for p, at in named))
        elif event in _FORBIDDEN and not _is_harmless(event, given):
            self.found.append(f"{event} {given!r:.200}")

    def _require_inside(self, event: str, paths: Iterable[Any]) -> None:
        for path in paths:
            if isinstance(path, int):
                continue
            where = os.path.realpath(os.fsdecode(path))
            if not any(where == root or where.startswith(f"{root}/") for root in self.roots):
                self.found.append(f"{event} {where}")

    @contextmanager
    def over(self, *roots: Path) -> Iterator[list[str]]:
        """Note what happens from here on, but writing into some folders; yield what was noted."""
        self.roots = [*map(os.path.realpath, roots), os.devnull]
        self.found, self.active = [], True
        try:
            yield self.found
        finally:
            self.active = False


# Event -> how many paths it is given, and where the folders are that these are relative to.
_PATHS: dict[str, tuple[int, list[int]]] = {
    "os.mkdir": (1, [2]), "os.remove": (1, [1]), "os.rmdir": (1, [1]), "os.rename": (2, [2, 3]),
    "os.link": (2, [2, 3]), "os.truncate": (1, []), "os.chmod": (1, [2]), "os.chown": (1, [3]),
    "os.utime": (1, [3]),
}  # fmt: skip
_FORBIDDEN = {
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn",
    "os.symlink", "sqlite3.connect", "pty.spawn", "webbrowser.open",
}  # fmt: skip


def _is_harmless(event: str, given: tuple[Any, ...]) -> bool:
    return event == "subprocess.Popen" and given[1][0] == "git"


WATCH = Watch()
sys.addaudithook(WATCH)  # for good: Python takes none away


@contextmanager
def listener() -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield the URL of a server on this machine, and a function that counts who came."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        server.setblocking(False)
        came = 0

        def count() -> int:
            nonlocal came
            while True:
                try:
                    server.accept()[0].close()
                except BlockingIOError:
                    return came
                came += 1

        yield f"http://127.0.0.1:{server.getsockname()[1]}", count
