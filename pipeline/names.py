"""Names that come from a store, and the rule that none of them leads out of it.

Whoever can write to a store can put any name into it, and any text into its documents. So a stored
path is checked each time that it is used, wherever its parts come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.text import CONTROLS

_PART_BYTES = 255  # the longest name that file systems take
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def require_inside(path: str) -> str:
    """Return a path relative to a storage's root, after checking that it stays below it.

    Raises:
        StoreError: it does not, or has a part that no stored name has.
    """
    for part in path.split("/"):
        long = len(part.encode(errors="replace")) > _PART_BYTES
        if part in {"", ".", ".."} or "\\" in part or long or CONTROLS.search(part):
            raise StoreError(f"{path[:200]!r} is no path inside a storage")
    return path


def holds_link(folder: Path) -> bool:
    """Tell whether a folder is, or holds at any depth, a symbolic link; stores have none."""
    return folder.is_symlink() or any(path.is_symlink() for path in folder.rglob("*"))


def store_around(path: Path) -> Path | None:
    """Return the store that a file lies in, or None.

    No code is imported from a store: a stored document that names a module there would run it.
    """
    for folder in path.resolve().parents:
        if (folder / "storage.json").is_file() and (folder / "stages").is_dir():
            return folder
    return None


def numbers(names: Iterable[str]) -> Iterator[int]:
    """Yield the names that are numbers; others are not ours, such as a file manager's."""
    return (int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 10)


def run_ids(names: Iterable[str]) -> list[str]:
    """Return the names that may be ids of runs."""
    return [name for name in names if _RUN_ID.fullmatch(name)]
