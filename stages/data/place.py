"""Where data are looked for. The catalogue imports this, so it imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """Return the folder that data sets are under: `FISHLEG_DATA`, by default `data`."""
    return Path(os.path.expanduser(os.environ.get("FISHLEG_DATA", "data")))


def tree_folder(root: Path, path: str) -> Path:
    """Return the folder of a tree of images: `path` under `root`; absolute, or from `~`, itself."""
    return root / os.path.expanduser(path)
