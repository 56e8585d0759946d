"""Tracking as JSON lines: `tracking/RUN.jsonl`, one object an event, to follow and to filter."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.events import Event
from pipeline.tracking.base import AbstractTracker, CellFacts, RunFacts

FOLDER = Path("tracking")


class JsonLinesTracker(AbstractTracker):
    """Appends to a file of the run's own; a resumed run goes on with it."""

    def __init__(self) -> None:
        self.ids: dict[str, Any] = {}
        self._path = FOLDER

    def open_run(self, run: RunFacts) -> None:
        """Open the file, and write the run's facts."""
        FOLDER.mkdir(exist_ok=True)
        self._path = FOLDER / f"{run.run_id}.jsonl"
        self._write(
            "run", state="running", run=run.run_id, name=run.name, file=run.spec_file, **run.tags
        )

    def open_cell(self, cell: CellFacts) -> None:
        """Write that the cell runs, with its parameters."""
        self._write_cell(cell, "running")

    def log(self, cell: str, events: list[Event]) -> None:
        """Write the events as they are, each with its cell."""
        lines = [json.dumps({"cell": cell, **event}) + "\n" for event in events]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def close_cell(self, cell: str, state: str, outputs: Mapping[str, Path]) -> None:
        """Write the cell's end and where its files are."""
        paths = {name: str(path) for name, path in outputs.items()}
        self._write("cell", cell=cell, state=state, outputs=paths)

    def link_cached(self, cell: CellFacts, source: str | None) -> None:
        """Write that the cell's result was there already."""
        self._write_cell(cell, "cached")

    def promote(self, output: str, folder: Path) -> None:
        """Write where the run's report is."""
        self._write("report", output=output, path=str(folder))

    def close_run(self, state: str) -> None:
        """Write the run's end."""
        self._write("run", state=state)

    def _write_cell(self, cell: CellFacts, state: str) -> None:
        self._write(
            "cell",
            cell=cell.cell,
            state=state,
            stage=cell.stage,
            key=cell.key,
            params=dict(cell.params),
            **cell.tags,
        )

    def _write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"type": kind, "time": time.time(), **fields}) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
