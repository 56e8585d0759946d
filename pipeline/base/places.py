"""Resolution of the paths in pipeline files, options and variables.

`~` is the home folder. A path in a pipeline file is relative to the file; one in an option or a
variable is relative to the working directory. By default, `mlflow.db` and `tracking/` lie beside
a store with a relative path, else beside the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.base.names import ABOUT
from pipeline.base.variables import STORAGE, TRACKING_URI

DATABASE = "mlflow.db"
_SQLITE = "sqlite:///"
LINES = "tracking"  # the folder of JSON lines


def lead(path: str, folder: Path | str = "") -> str:
    """Return a path relative to a folder in normal form; a URL stays as it is.

    >>> lead("../.fls", "experiments"), lead("/data/fls", "experiments"), lead("s3://b/x", "y")
    ('.fls', '/data/fls', 's3://b/x')
    """
    if "://" in path:
        return path
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))


def defaults_folder(storage: str, folder: Path) -> Path:
    """Return the default folder of `mlflow.db` and `tracking/`.

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
    """Return MLflow's address: `MLFLOW_TRACKING_URI`, else the spec's, else a local database.

    A resumed run keeps its recorded address instead of a default or a relative declared path.

    Args:
        declared: the spec's address, or None.
        recorded: the address of a resumed run, or None.
        folder: folder of a relative declared path.
        default_folder: folder of the default database.
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
    """Return a URI that is independent of the working directory."""
    path = uri.removeprefix(_SQLITE)
    return uri if path == uri else _SQLITE + os.path.abspath(lead(path))


def moved(given: str, folder: Path, tracking: Path) -> list[str]:
    """Return hints about data where an earlier version put it: below the working directory.

    Args:
        given: the storage as a pipeline file gives it.
        folder: the file's.
        tracking: see `defaults_folder`.
    """
    told = []
    before, now = (os.path.abspath(lead(given, one)) for one in ("", folder))
    there = os.path.isfile(os.path.join(before, ABOUT))
    if "://" not in given and there and not os.path.exists(now):
        told.append(
            f"A relative `storage:` starts at the pipeline file, so results go to {now}. An "
            f"earlier version put them into {before}: give that as `storage:` to use it."
        )
    old, new = os.path.abspath(DATABASE), os.path.abspath(tracking / DATABASE)
    if told and os.path.isfile(old) and not os.path.exists(new):
        told.append(f"Its tracking data is in {old}: `mlflow: {{tracking_uri: ...}}`.")
    return told


def tracking_folder_of(storage: str, folder: Path) -> Path:
    """Return `defaults_folder`, or the file's folder where FISHLEG_STORAGE is set."""
    return folder if STORAGE.read() else defaults_folder(storage, folder)
