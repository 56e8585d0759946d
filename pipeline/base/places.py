"""Where a path leads that somebody gives, said once.

`~` is the home folder. What a pipeline file says is relative to the file, as the same file means
the same wherever one stands; an option or a variable is relative to where one stands. What is left
to its default lies together: `mlflow.db` and `tracking/` beside the store, where that is a folder
given by a relative path, else beside the file.
"""

from __future__ import annotations

import os
from pathlib import Path

DATABASE = "mlflow.db"
LINES = "tracking"  # the folder of JSON lines


def lead(path: str, folder: Path | str = "") -> str:
    """Return where a path leads that is relative to a folder; a URL is none.

    >>> lead("../.fls", "experiments"), lead("/data/fls", "experiments"), lead("s3://b/x", "y")
    ('.fls', '/data/fls', 's3://b/x')
    """
    if "://" in path:
        return path
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))


def defaults_folder(storage: str, folder: Path) -> Path:
    """Return where `mlflow.db` and `tracking/` lie by default.

    Args:
        storage: as a pipeline file gives it.
        folder: the file's.
    """
    if "://" in storage or os.path.isabs(os.path.expanduser(storage)):
        return folder
    return Path(lead(storage, folder)).parent


def moved(given: str, folder: Path, tracking: Path) -> list[str]:
    """Return sentences about what lies where it was looked for when all was relative to here.

    Args:
        given: the storage as a pipeline file gives it.
        folder: the file's.
        tracking: see `defaults_folder`.
    """
    told = []
    before, now = (os.path.abspath(lead(given, one)) for one in ("", folder))
    there = os.path.isfile(os.path.join(before, "storage.json"))  # False of what can be no path
    if "://" not in given and there and not os.path.exists(now):
        told.append(
            f"A relative `storage:` starts at the pipeline file, so results go to {now}; there is "
            f"a store at {before}, where they went: give that as `storage:` to go on with it."
        )
    old, new = os.path.abspath(DATABASE), os.path.abspath(tracking / DATABASE)
    if told and os.path.isfile(old) and not os.path.exists(new):
        told.append(f"So is what was tracked, in {old}: `mlflow: {{tracking_uri: ...}}`.")
    return told
