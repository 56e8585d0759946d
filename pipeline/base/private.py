"""Folders in the machine's temporary folder that belong to this user and are closed to others."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from pipeline.base.errors import StorageUnsupported


def private_place(*names: str) -> Path:
    """Return the path of this user's folder of these names in the temporary folder."""
    return Path(tempfile.gettempdir(), f"fls-{os.getuid()}", *names)


def make_private(folder: Path) -> Path:
    """Make a folder of `private_place`, level by level, and return it.

    A level that is a link, a file or another user's is refused (`StorageUnsupported`): its owner
    could read and change the files in it.
    """
    root = Path(tempfile.gettempdir())
    levels = [one for one in (folder, *folder.parents) if root in one.parents]
    for level in reversed(levels):
        try:
            os.mkdir(level, 0o700)
        except FileExistsError:
            _check_own(level)
    return folder


def is_private(folder: Path) -> bool:
    """Tell whether a folder exists and belongs to this user."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _check_own(folder: Path) -> None:
    if not is_private(folder):
        raise StorageUnsupported(
            f"{folder} is not a folder of user {os.getuid()}, and private copies belong there. "
            "Remove it, or set TMPDIR to a folder of your own."
        )
    if stat.S_IMODE(folder.lstat().st_mode) & 0o077:
        folder.chmod(0o700)
