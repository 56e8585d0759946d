"""The context of a running stage: its inputs, outputs, reports and checkpoints."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.base.names import numbers
from pipeline.stage.errors import Preempted, StageError


@dataclass
class Preemption:
    """Whether the attempt was asked to stop; a signal may set it at any moment."""

    asked: bool = False

    def ask(self) -> None:
        """Ask the attempt to stop."""
        self.asked = True


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One upstream output.

    Attributes:
        cell: full cell name, such as `oneshot[method=eigen,seed=0,sparsity=0.9]`.
        stage: stage name in the spec, such as `oneshot`.
        key: the cell's key.
        axes: matrix axis -> value.
        path: local folder with the files (read-only by convention), or None if the cell failed.
    """

    cell: str
    stage: str
    key: str
    axes: Mapping[str, Any]
    path: Path | None


class EventSink(Protocol):
    """Takes events in order: one flat JSON object each, with `type` and `time` (Unix seconds)."""

    def __call__(self, event: dict[str, Any]) -> None:
        """Append one event."""


def _discard(event: dict[str, Any]) -> None:
    """Discard an event: the sink of a context made in a test."""


@dataclass(kw_only=True)
class Context:
    """The inputs, outputs, reports and checkpoints of a running stage.

    A test makes one by hand: `Context(params=..., folder=tmp_path, inputs={...})`.

    Attributes:
        params: the validated parameters.
        folder: the attempt's local folder; holds `outputs/NAME/` and `checkpoints/`.
        inputs: input name -> artifacts, in spec order then cell order (one unless `many`).
        device: "cpu" or "cuda".
        threads: intra-op threads the stage may use (already set for torch by the worker).
        rank: this process's rank, 0 <= rank < world_size. Only rank 0 has the checkpoint to resume
            from, and only its `folder` is kept.
        world_size: number of ranks of the stage.
        rendezvous: an `init_method` of torch.distributed where the ranks meet; "" if they have met.
        emit: sink of the events.
        checkpoint_every_s: seconds between in-stage checkpoints, for `checkpoint_due`; longer if
            writing takes long, so that checkpoints take at most a tenth of the time. With 0, one is
            always due.
        preemption: whether the attempt ends at its next checkpoint, which is then due at once.
        cell: the cell's full name.
        key: the cell's key.
    """

    params: Any
    folder: Path
    inputs: Mapping[str, Sequence[Artifact]] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    rank: int = 0
    world_size: int = 1
    rendezvous: str = ""
    emit: EventSink = _discard
    checkpoint_every_s: float = 30.0
    preemption: Preemption = field(default_factory=Preemption)
    cell: str = "stage"
    key: str = ""
    _last_checkpoint_time: float = field(default_factory=time.monotonic, repr=False)
    _writing_s: float = field(default=0.0, repr=False)

    # -- data in and out

    def input(self, name: str) -> Artifact:
        """Return the single artifact connected to input `name`.

        Raises:
            StageError: nothing is connected, or the upstream cell failed.
        """
        found = self.inputs.get(name, ())
        if len(found) != 1:
            raise StageError(f"input {name!r} has {len(found)} artifacts; expected exactly one.")
        if found[0].path is None:
            raise StageError(f"input {name!r}: the upstream cell {found[0].cell} failed.")
        return found[0]

    def output(self, name: str) -> Path:
        """Return the folder of output `name`, made if needed; it is published at the end."""
        path = self.folder / "outputs" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    # -- reporting

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Report metrics, at `step` of a series or (None) as final values of this cell's run."""
        values = {name: _number(value) for name, value in metrics.items()}
        self._event("metrics", values=values, step=step)

    def progress(self, done: float, total: float, unit: str) -> None:
        """Report progress inside the stage: `done` of `total` `unit` (such as "epoch")."""
        self._event("progress", done=float(done), total=float(total), unit=unit)

    def say(self, text: str) -> None:
        """Report one line of plain text for the cell's log."""
        self._event("text", text=text)

    def record(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Report one evaluated object (a model) that gets a child run of its own in tracking."""
        values = {key: _number(value) for key, value in metrics.items()}
        self._event("record", name=name, params=dict(params), metrics=values)

    def _event(self, kind: str, **fields: Any) -> None:
        if self.rank == 0:
            self.emit({"type": kind, "time": time.time(), **fields})

    # -- in-stage checkpoints

    def checkpoint_due(self) -> bool:
        """Tell whether `checkpoint_every_s` seconds have passed since the last checkpoint.

        One is also due once the attempt is asked to stop, so a stage asks as often as it can write
        one.
        """
        waited_s = time.monotonic() - self._last_checkpoint_time
        wait_s = self.checkpoint_every_s and max(self.checkpoint_every_s, 9 * self._writing_s)
        return self.preemption.asked or waited_s >= wait_s

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """Yield an empty folder, which becomes the newest checkpoint on leaving.

        The switch is atomic: a kill at any moment leaves either the old or the new checkpoint
        whole. The one before the newest is kept, older ones are deleted.

        Raises:
            Preempted: the checkpoint is written, and the attempt was asked to stop.
        """
        root = self.folder / "checkpoints"
        root.mkdir(parents=True, exist_ok=True)
        earlier = self._checkpoint_numbers()
        number = (earlier[-1] if earlier else 0) + 1
        part = root / f"{number:06d}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        began = time.monotonic()
        yield part
        part.replace(root / f"{number:06d}")
        for old in earlier[:-1]:
            shutil.rmtree(root / f"{old:06d}", ignore_errors=True)
        self._event("checkpoint", number=number)
        self._last_checkpoint_time = time.monotonic()
        self._writing_s = self._last_checkpoint_time - began
        if self.preemption.asked:
            raise Preempted

    def last_checkpoint(self) -> Path | None:
        """Return the folder of the newest whole checkpoint of this cell, or None."""
        found = self._checkpoint_numbers()
        return self.folder / "checkpoints" / f"{found[-1]:06d}" if found else None

    def _checkpoint_numbers(self) -> list[int]:
        root = self.folder / "checkpoints"
        if not root.is_dir():
            return []
        return sorted(numbers(os.listdir(root)))


def _number(value: Any) -> float:
    """Return a value as a float; an integer beyond all floats is infinite, as in torch."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON (UTF-8, sorted keys, finite numbers only), by rename."""
    part = path.with_name(path.name + ".part")
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
