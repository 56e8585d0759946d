"""The list of benchmarks, and the folder of unfinished cells.

A benchmark is a file in `benchmarks/`: a pipeline `NAME.yaml` that the product runs itself, or a
module `NAME.py` with

    TITLE: str                                            the section's heading
    cells() -> dict[str, dict]                            cell name -> parameters, JSON
    run_cell(params: dict, folder: Path) -> dict          the cell's result, JSON; it keeps its
                                                          `folder` until the cell is finished
    report(documents: dict[str, dict], figures: Path) -> str  the section in Markdown, without its
                                                          heading, of the finished cells'
                                                          documents (`result` is what run_cell
                                                          gave); `figures` is the folder for its
                                                          figures
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pipeline.base.errors import BadInput, nearest

BENCHMARKS = Path(__file__).resolve().parents[1]
EXPERIMENTS = {
    "digits": BENCHMARKS.parent / "pipeline.yaml",
    "mnist_mlp": BENCHMARKS.parent / "experiments" / "mnist_mlp.yaml",
}
"""Pipelines for users whose results are committed, too."""
STORE_VARIABLE = "FISHLEG_BENCHMARKS_STORE"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its name, and its pipeline or module."""

    name: str
    path: Path

    @property
    def is_pipeline(self) -> bool:
        """Whether the product runs it, not this package."""
        return self.path.suffix == ".yaml"


def list_benchmarks(folder: Path = BENCHMARKS) -> list[Benchmark]:
    """Return the benchmarks of a folder by name; of this one also the `EXPERIMENTS`."""
    paths = [*folder.glob("*.yaml"), *folder.glob("*.py")]
    found = [Benchmark(path.stem, path) for path in paths if not path.stem.startswith("_")]
    if folder == BENCHMARKS:
        found += [Benchmark(name, path) for name, path in EXPERIMENTS.items()]
    return sorted(found, key=lambda one: one.name)


def find_benchmark(name: str, folder: Path = BENCHMARKS) -> Benchmark:
    """Return the benchmark called `name`.

    Raises:
        BadInput: there is none.
    """
    known = {one.name: one for one in list_benchmarks(folder)}
    if name not in known:
        raise BadInput(f"there is no benchmark {name!r}{nearest(name, known)}.")
    return known[name]


def load_script(path: Path) -> ModuleType:
    """Import a benchmark's module from its file."""
    name = f"benchmarks.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{path} is no Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    spec.loader.exec_module(module)
    return module


def store_folder() -> Path:
    """Return the folder of unfinished cells: FISHLEG_BENCHMARKS_STORE, or .fls-benchmarks."""
    return Path(os.environ.get(STORE_VARIABLE, ".fls-benchmarks"))


def matches(patterns: Sequence[str], cell: str) -> bool:
    """Tell whether a cell's whole name fits one of some patterns; every name fits none.

    In a pattern, `*` matches any text.
    """
    fits = (".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns)
    return not patterns or any(re.fullmatch(one, cell) for one in fits)
