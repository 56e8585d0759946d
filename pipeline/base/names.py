"""Names that come from a store, and the rule that none of them leads out of it.

A writer to the store can put any name into it, and any text into its documents. So a stored
path is checked each time that it is used, wherever its parts come from.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.base.errors import StoreError
from pipeline.base.text import CONTROLS

_PART_BYTES = 255  # the longest name that file systems take


def require_inside(path: str) -> str:
    """Return a path relative to a storage's root, which stays below it however it is spelt.

    Raises:
        StoreError: it is absolute, or has a part that is `..`, looks like it or holds look-alikes
            of slashes, is longer than file systems take, or drives a terminal.

    >>> require_inside("stages/ab/manifest.json")
    'stages/ab/manifest.json'
    """
    parts = unicodedata.normalize("NFKC", path).replace("\\", "/").split("/")
    leads_out = not {"", ".", ".."}.isdisjoint(parts) or len(parts) != path.count("/") + 1
    too_long = any(len(part.encode(errors="replace")) > _PART_BYTES for part in path.split("/"))
    if leads_out or too_long or CONTROLS.search(path):
        raise StoreError(f"{path[:200]!r} is no path inside a storage; expected plain names.")
    return path


def store_around(path: Path) -> Path | None:
    """Return the store that a file lies in, or None.

    No code is imported from a store: a stored document that names a module there would run it.
    """
    for folder in path.resolve().parents:
        if is_store(folder):
            return folder
    return None


def is_store(folder: Path) -> bool:
    """Tell whether a folder is a store."""
    return (folder / "storage.json").is_file() and (folder / "stages").is_dir()


def numbers(names: Iterable[str]) -> Iterator[int]:
    """Yield the names that are numbers; others are not ours, such as a file manager's.

    >>> list(numbers(["0012", "copy of 0001", "²", "9" * 5000]))
    [12]
    """
    return (int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 10)
