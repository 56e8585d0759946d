"""Where a path leads that somebody gives, said once.

`~` is the home folder. What a pipeline file says is relative to the file, as the same file means
the same wherever one stands; an option or a variable is relative to where one stands. What is left
to its default lies together: `mlflow.db` and `tracking/` beside the store, where that is a folder
given by a relative path, else beside the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.base.variables import STORAGE, TRACKING_URI

DATABASE = "mlflow.db"
_SQLITE = "sqlite:///"
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


def tracking_uri(
    declared: str | None,
    recorded: str | None = None,
    *,
    folder: Path | str = "",
    default_folder: Path | str = "",
) -> str:
    """Return where MLflow data goes: `MLFLOW_TRACKING_URI`, else what the spec says, else here.

    A run that goes on stays where it is `recorded`, rather than go to a default; and a declared
    path that is relative was so to the folder in which it began.

    Args:
        declared: what the spec says, or None.
        recorded: where the run is recorded that goes on, or None.
        folder: where a declared path starts.
        default_folder: where the undeclared database lies.
    """
    if recorded and declared and absolute_uri(declared) != declared:
        declared = None
    given = TRACKING_URI.read()
    if given:
        return _rooted(given, "")
    if declared:
        return _rooted(declared, folder)
    return recorded or _rooted(f"{_SQLITE}{DATABASE}", default_folder)


def _rooted(uri: str, folder: Path | str) -> str:
    path = uri.removeprefix(_SQLITE)
    return uri if path == uri else _SQLITE + lead(path, folder)


def absolute_uri(uri: str) -> str:
    """Return a URI that means the same in any folder."""
    path = uri.removeprefix(_SQLITE)
    return uri if path == uri else _SQLITE + os.path.abspath(lead(path))


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
            f"a store at {before}, where they went: give that as `storage:` to use it."
        )
    old, new = os.path.abspath(DATABASE), os.path.abspath(tracking / DATABASE)
    if told and os.path.isfile(old) and not os.path.exists(new):
        told.append(f"So is what was tracked, in {old}: `mlflow: {{tracking_uri: ...}}`.")
    return told


def tracking_folder_of(storage: str, folder: Path) -> Path:
    """Return where `mlflow.db` and `tracking/` of a spec lie by default.

    Args:
        storage: as the file gives it.
        folder: the file's.
    """
    return folder if STORAGE.read() else defaults_folder(storage, folder)
