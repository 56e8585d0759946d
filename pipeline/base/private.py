"""Folders in the machine's temporary folder that no other user can look into or have made."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from pipeline.base.errors import StorageUnsupported


def private_place(*names: str) -> Path:
    """Return where this user's folder of these names is, in the temporary folder; makes nothing."""
    return Path(tempfile.gettempdir(), f"fls-{os.getuid()}", *names)


def make_private(folder: Path) -> Path:
    """Make a folder of `private_place`, level by level, and return it.

    A level that is another user's, a link or a file is refused (`StorageUnsupported`): its owner
    could read and change what is put there.
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
    """Tell whether a folder is there, and is this user's own."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _check_own(folder: Path) -> None:
    """Check that a folder is this user's own, and close it to all others.

    Raises:
        StorageUnsupported: it is not.
    """
    if not is_private(folder):
        raise StorageUnsupported(
            f"{folder} is not a folder of user {os.getuid()}, who would keep private copies there; "
            "expected one of your own. Remove it, or set TMPDIR to a folder of your "
            "own."
        )
    if stat.S_IMODE(folder.lstat().st_mode) & 0o077:
        folder.chmod(0o700)
