"""The committed results of the pipelines, as the lines of tables."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness.documents import Document, read_cells
from benchmarks.harness.suite import Benchmark, find_benchmark
from pipeline.spec import yaml_loader
from stages.catalogue import Published
from stages.report.summary import PUBLISHED, SECTIONS, Lines, Summary, summarise

MANY_STEPS = f"CHITA++{PUBLISHED}"
"""The published line that prunes in many steps."""


class Committed:
    """The documents in a folder of results; they are read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.documents = cache(self._documents)
        self.summary = cache(self._summary)

    def _documents(self, name: str) -> dict[str, Document]:
        return read_cells(self.folder, name)

    def _summary(self, name: str) -> Summary:
        return summarise(self.rows(name), published=read_comparison(find_benchmark(name))[1])

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the documents of a pipeline as rows of results."""
        return [{**one, "model_cell": cell} for cell, one in self.documents(name).items()]

    def section(self, name: str, section: str) -> Lines:
        """Return the lines of a section of a pipeline's table, or none."""
        return self.summary(name).sections.get(section, {}) if self.documents(name) else {}

    def one_step(self, name: str, published: str) -> Lines:
        """Return the one-step lines of a pipeline, with those published beside another one.

        Published lines have the sparsities of the others; one in many steps is left out.
        """
        section = SECTIONS["oneshot", False]
        own = {
            method: line
            for method, line in self.section(name, section).items()
            if not method.endswith(PUBLISHED)
        }
        known = {at for line in own.values() for at in line}
        others = {
            method: {at: point for at, point in line.items() if at in known}
            for method, line in self.section(published, section).items()
            if method.endswith(PUBLISHED) and method != MANY_STEPS
        }
        return {**own, **others}

    def several_steps(self, name: str) -> Lines:
        """Return the lines in several steps, refined or not, and the published one."""
        published = self.section(name, SECTIONS["oneshot", False])
        refined = self.section(name, SECTIONS["refined", False])
        return {
            **{f"{method}, refined": line for method, line in refined.items()},
            **self.section(name, SECTIONS["multistep", False]),
            **{method: line for method, line in published.items() if method == MANY_STEPS},
        }

    def params(self, name: str, stage: str) -> dict[str, Any]:
        """Return the parameters of a stage, as its pipeline's file has them, without references."""
        value = read_file(find_benchmark(name))
        known = value["vars"]
        return {
            key: known[one[7:-1]] if isinstance(one, str) and one.startswith("${vars.") else one
            for key, one in _resolved(value["stages"][stage]["params"], known).items()
        }


def _resolved(params: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _resolved(one, known)
        if isinstance(one, dict)
        else known[one[7:-1]]
        if isinstance(one, str) and one.startswith("${vars.")
        else one
        for key, one in params.items()
    }


def read_file(benchmark: Benchmark) -> dict[str, Any]:
    """Return the content of a pipeline's file, as it is.

    Building a spec needs the pipeline's data and checkpoints.
    """
    text = benchmark.path.read_text(encoding="utf-8")
    return yaml_loader.load(text, str(benchmark.path)).value


def read_comparison(benchmark: Benchmark) -> tuple[str, list[tuple[str, dict[float, float]]]]:
    """Return the title and the published rows of a pipeline's `compare`."""
    stages = read_file(benchmark)["stages"].values()
    comparisons = [one.get("params", {}) for one in stages if one["uses"] == "compare"]
    params: dict[str, Any] = comparisons[0] if comparisons else {}
    rows = [Published.model_validate(row) for row in params.get("published", [])]
    values = [(row.method, dict(zip(row.sparsity, row.accuracy, strict=True))) for row in rows]
    return params.get("title", benchmark.name), values
