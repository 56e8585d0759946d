"""Runs a stage in this process, as a worker would, and keeps what it reported."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.spec.load import load_spec
from pipeline.stage import Artifact, Context
from stages.catalogue import CATALOGUE

STAGES = {stage.name: stage for stage in CATALOGUE.stages}
TINY = {"dataset": "digits", "model": "digits_resnet", "model_args": {"width": 4, "hidden": 16}}


@dataclass(kw_only=True)
class Ran:
    """A finished stage: its output folders and what it reported."""

    folder: Path
    params: Any
    events: list[dict[str, Any]] = field(default_factory=list)

    def output(self, name: str = "model") -> Path:
        return self.folder / "outputs" / name

    def metrics(self) -> dict[str, float]:
        """Final values, the last of each name."""
        found = [e["values"] for e in self.events if e["type"] == "metrics" and e["step"] is None]
        return {name: value for values in found for name, value in values.items()}

    def texts(self) -> str:
        return "\n".join(event["text"] for event in self.events if event["type"] == "text")

    def progress(self) -> list[float]:
        return [event["done"] for event in self.events if event["type"] == "progress"]

    def records(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == "record"]


def artifact(path: Path | None, cell: str = "up", **axes: Any) -> Artifact:
    return Artifact(cell=cell, stage=cell.partition("[")[0], key="", axes=axes, path=path)


def run_stage(
    name: str,
    folder: Path,
    params: Mapping[str, Any],
    inputs: Mapping[str, Path | Sequence[Artifact]] | None = None,
    *,
    watch: Callable[[dict[str, Any]], None] = lambda event: None,
    **context: Any,
) -> Ran:
    """Run stage `name` in `folder`; an input is a folder, or a list of artifacts.

    `watch` sees every event.
    """
    stage = STAGES[name]
    module, _, attribute = stage.entry.partition(":")
    ran = Ran(folder=folder, params=stage.params.model_validate(dict(params)))
    connected = {
        key: [artifact(value)] if isinstance(value, Path) else value
        for key, value in (inputs or {}).items()
    }

    def emit(event: dict[str, Any]) -> None:
        ran.events.append(event)
        watch(event)

    ctx = Context(params=ran.params, folder=folder, inputs=connected, emit=emit, **context)
    getattr(importlib.import_module(module), attribute)(ctx)
    return ran


def run_cells(path: Path, folder: Path, overrides: Sequence[str]) -> dict[str, Path]:
    """Run all cells of a spec in this process, in order; return cell name -> outputs folder."""
    done: dict[str, Path] = {}
    for number, cell in enumerate(load_spec(path, overrides).cells):
        inputs = {
            name: [artifact(done[one.cell] / one.output, cell=one.cell) for one in sources]
            for name, sources in cell.inputs.items()
        }
        params = cell.params.model_dump()
        ran = run_stage(cell.declaration.name, folder / str(number), params, inputs)
        done[cell.name] = ran.folder / "outputs"
    return done
