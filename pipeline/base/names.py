"""Names that come from a store, and the check that none of them leads out of it.

A writer to the store can choose any name in it, so a stored path is checked at each use.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.base.errors import StoreError
from pipeline.base.text import CONTROLS

ABOUT, STAGES = "storage.json", "stages"  # every store has these
_PART_BYTES = 255  # the longest name that file systems allow


def require_inside(path: str) -> str:
    """Return a path relative to a storage's root, if it stays below that root.

    Raises:
        StoreError: it is absolute, has a part that is or looks like `..`, contains look-alikes of
            slashes or control characters, or has a part longer than file systems allow.

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
    """Return the store that contains a file, or None; no code is imported from a store."""
    return next(filter(is_store, path.resolve().parents), None)


def is_store(folder: Path) -> bool:
    """Tell whether a folder is a store."""
    return (folder / ABOUT).is_file() and (folder / STAGES).is_dir()


def numbers(names: Iterable[str]) -> Iterator[int]:
    """Yield the names that are numbers; others, such as a file manager's, are foreign.

    >>> list(numbers(["0012", "copy of 0001", "²", "9" * 5000]))
    [12]
    """
    return (int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 10)
