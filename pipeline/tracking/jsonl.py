"""Tracking as JSON lines: `tracking/RUN.jsonl`, one object an event."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.base.errors import PipelineError
from pipeline.base.states import CellState, RunState
from pipeline.store.events import Event
from pipeline.tracking.base import AbstractTracker, CellEnd, CellFacts, RunFacts
from pipeline.tracking.outage import may_pass


class JsonLinesTracker(AbstractTracker):
    """Appends to one file a run; a resumed run continues it."""

    def __init__(self) -> None:
        super().__init__()
        self._path = Path()

    def open_run(self, run: RunFacts) -> None:
        """Open the file, and write the run's facts.

        Raises:
            PipelineError: the folder cannot be made.
        """
        self._path = _path(run)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise PipelineError(f"JSON lines cannot go into {run.folder}: {error}") from error
        about = {"run": run.run_id, "name": run.name, "file": run.spec_file, **run.tags}
        asked = {"set": run.overrides, "selection": run.selection, "environment": run.environment}
        self._write("run", state=RunState.RUNNING, **about, **asked, resolved=run.resolved)

    def open_cell(self, cell: CellFacts) -> None:
        """Write that the cell runs, with its parameters."""
        self._write_cell(cell, CellState.RUNNING)

    def log(self, cell: str, events: list[Event]) -> None:
        """Write the events unchanged, each with its cell."""
        lines = [json.dumps({"cell": cell, **event}) + "\n" for event in events]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def close_cell(self, cell: str, end: CellEnd) -> None:
        """Write the cell's end and the folders of its files."""
        paths = {name: str(path) for name, path in end.outputs.items()}
        self._write("cell", cell=cell, state=end.state, outputs=paths)

    def forget_cell(self, cell: str, *, records: bool = False) -> None:
        """Write nothing: later lines say that the cell runs again."""

    def link_cached(self, cell: CellFacts, source: str | None, made: CellEnd) -> None:
        """Write that the cell's result was there already, and which run made it."""
        self._write_cell(cell, CellState.CACHED, made_by=made.making.get("run"))

    def register(self, cell: CellFacts, folder: Path) -> None:
        """Write that the model is to be registered; there is no registry here."""
        about = asdict(cell.registration) if cell.registration else {}
        self._write("register", cell=cell.cell, path=str(folder), **about)

    def promote(self, output: str, folder: Path) -> None:
        """Write the folder of the run's report."""
        self._write("report", output=output, path=str(folder))

    def close_run(self, state: RunState) -> None:
        """Write the run's end."""
        self._write("run", state=state)

    def close_orphan(self, run: RunFacts, state: RunState, cells: Mapping[str, CellState]) -> bool:
        """Write the end into the other run's file, if it has one."""
        path = _path(run)
        if path.is_file():
            line = {"type": "run", "time": time.time(), "state": state}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return path.is_file()

    def is_outage(self, error: Exception) -> bool:
        """Return whether the error may pass, such as a full disk."""
        return may_pass(error)

    def _write_cell(self, cell: CellFacts, state: CellState, **more: Any) -> None:
        self._write(
            "cell",
            cell=cell.cell,
            state=state,
            stage=cell.stage,
            key=cell.key,
            params=dict(cell.params),
            **cell.tags,
            **more,
        )

    def _write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"type": kind, "time": time.time(), **fields}) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)


def _path(run: RunFacts) -> Path:
    return Path(run.folder) / f"{run.run_id}.jsonl"
