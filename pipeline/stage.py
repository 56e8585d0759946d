"""All that a stage may use of the runner: how it is declared, and the context it runs in.

A plugin has a light catalogue module (pydantic and the standard library only) which declares its
stages; each names an entry point `module:function` that is imported in a worker only. The function
takes one `Context` and returns nothing: it reads inputs from folders, writes outputs to folders,
and reports metrics, progress and records through the context. Nothing here imports ray, mlflow,
torch or yaml, so a stage also runs in a plain process, and in a test.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic_core.core_schema import no_info_after_validator_function

from pipeline.base.names import numbers
from pipeline.base.rows import csv_text as csv_text

# ------------------------------------------------------------------------------- declaration


class Params(BaseModel):
    """Base of every stage's parameters: unknown keys refused, types strict, frozen.

    Use `list`, not `tuple`, for sequences (YAML has lists). Every field has a `description`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name of a registry.

    Attributes:
        target: `module:attribute` that the name stands for; its code enters the key of each cell
            that names it.
        digest: hex sha256 that stands for the entry's data (a data set's decoded arrays), or None.
        folder: of data without a declared digest: the name -> the folder that holds them, as this
            process sees it. A digest of it enters the key where the planner finds it, and workers
            compare.
        facts: light facts for estimates, for example `{"parameters": 272474}`.
        summary: one line for listings.
    """

    target: str
    digest: str | None = None
    folder: Callable[[str], Path] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True, eq=False)  # hashed by identity, as `Annotated[...] | None` demands
class Registry:
    """Names that a parameter may take, each standing for a `module:attribute`.

    Attach it to a field as `Annotated[str, REGISTRY]`. The runner then checks the value, suggests
    the nearest name, and lets the code (and data digest) behind the name enter the cell's key.

    Attributes:
        kind: what the names are, in the singular: "model", "data set".
        entries: name -> Entry.
        open: also accept `package.module:function` of the user's own.
        prefixes: prefix -> Entry for families of names, for example `{"torchvision/": Entry(...)}`.
        data: whether the names stand for data; where nothing of them can enter the key, the plan
            says "data not checked".
        verified_by: the parameter beside the name, if any, that is false where a declared digest is
            not compared.
        options: the parameter beside the name, if any, that holds options of what it stands for.
        renamed: earlier name -> present name, which the error of an earlier one gives.
    """

    kind: str
    entries: Mapping[str, Entry]
    open: bool = False
    prefixes: Mapping[str, Entry] = field(default_factory=dict)
    data: bool = False
    verified_by: str = ""
    options: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    def argument(self, name: str) -> str | None:
        """Return what follows the prefix in a name of a family, or None."""
        if name in self.entries:
            return None
        families = (prefix for prefix in self.prefixes if name.startswith(prefix))
        return next((name.removeprefix(prefix) for prefix in families), None)

    def find(self, name: str) -> Entry | None:
        """Return the entry of `name`, or None when there is none."""
        if name in self.entries:
            return self.entries[name]
        for prefix, entry in self.prefixes.items():
            if name.startswith(prefix) and len(name) > len(prefix):
                return entry
        module, colon, attribute = name.partition(":")
        parts = [*module.split("."), attribute]
        if self.open and colon and name.isascii() and all(part.isidentifier() for part in parts):
            return Entry(target=name)
        return None


@dataclass(frozen=True)
class ExternalFile:
    """Marks a string parameter as the path of a file whose sha256 enters the key.

    Use as `Annotated[str, ExternalFile()]`. Relative paths start at the working directory, and `~`
    is the home folder.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of such a string, which stands for the expanded path."""
        return no_info_after_validator_function(os.path.expanduser, handler(source))


@dataclass(frozen=True, kw_only=True)
class Input:
    """One declared input: the kind of output it takes.

    Attributes:
        kind: kind of the output that may be connected, such as "model".
        many: gathers every matching cell (fan-in) of one or more upstream stages; otherwise one.
        optional: may be left out of the spec.
        summary: one line of documentation.
    """

    kind: str
    many: bool = False
    optional: bool = False
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One declared output folder.

    Attributes:
        kind: what it holds; an `Input` of the same kind takes it.
        track: its files are uploaded to the tracking server with the cell's run.
        promote: its files are also logged on the parent run, and shown at the end of `fls run`.
        summary: one line of documentation.
    """

    kind: str
    track: bool = False
    promote: bool = False
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a cell of a stage needs: `workers` processes at once, each with all the rest.

    `memory_bytes` None means undeclared.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory_bytes: int | None = None
    accelerator_type: str | None = None
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A forecast made without running anything, in bytes; None where unknown."""

    memory_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The declaration of one stage type.

    Attributes:
        name: what `uses:` names.
        entry: `module:function` taking a `Context`.
        params: the parameter model.
        inputs: input name -> Input.
        outputs: output name -> Output. The spec's `inputs: {model: pretrain}` takes the upstream's
            only output of the kind that the input wants.
        resources: defaults; the spec's `resources:` overrides them key by key.
        estimate: forecast from the resolved parameters, and those of all cells upstream (nearest
            first), or None.
        parallel: several processes may run a cell together, as ranks of one group, to the result of
            one up to rounding; the spec's `workers:` says how many.
        summary: one line for listings.
    """

    name: str
    entry: str
    params: type[Params]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    outputs: Mapping[str, Output] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    estimate: Callable[[Any, Sequence[Params]], Estimate] | None = None
    parallel: bool = False
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Tells the runner how this plugin's results look, for `fls results` and the closing table.

    Attributes:
        kind: kind of the output folders that hold `rows.json`, a list of flat objects; a row names
            the model it is about by `model_cell` and `key` (the model cell's).
        columns: the columns of `fls results`, in order; the runner fills `cell` and `run_id`.
        further: fields of rows that JSON shows, and tables leave out.
        before: column -> the column that says the same in rows of before there was the first.
        report: kind of the output folder that holds `table.md`, `table.csv` and `figure.png`.
    """

    kind: str
    columns: Sequence[str]
    report: str
    further: Sequence[str] = ()
    before: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What `fls plan` says of outputs of one kind that are in the store.

    Attributes:
        kind: the outputs' kind.
        file: a small JSON file in their folders.
        entry: `module:function` taking that file's content and returning lines of text; imported by
            planning, so it imports nothing heavy.
    """

    kind: str
    file: str
    entry: str


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What a plugin module offers, as its attribute `CATALOGUE`.

    Attributes:
        stages: the stage types.
        packages: top-level packages whose code belongs to the stages (it enters the keys).
        results: how results look, or None.
        exporter: `module:function` taking (output folder: Path, destination: Path), behind
            `fls export`; writes a user's copy of an output of kind `exports`.
        exports: the kind of output that `fls export` copies, and that can be registered.
        loader: `module:function` taking (output folder: Path), behind a stage's `register:`;
            returns an output of kind `exports` as a `torch.nn.Module`, and a NumPy array as an
            example of its input, with more than one sample, so that any number can be given.
        inspector: `module:function` behind `fls inspect`, called in a process of its own: takes
            cell name -> parameters of the cells of the types in `inspects`, and returns a list of
            JSON objects with `cells`, `title`, `columns`, `rows` and `totals`.
        inspects: stage types that the inspector looks into.
        notes: what `fls plan` says of outputs.
        registries: shown by `fls list`.
    """

    stages: Sequence[Stage]
    packages: Sequence[str] = ()
    results: Results | None = None
    exporter: str | None = None
    exports: str | None = None
    loader: str | None = None
    inspector: str | None = None
    inspects: Sequence[str] = ()
    notes: Sequence[Notes] = ()
    registries: Sequence[Registry] = ()


# ----------------------------------------------------------------------------------- context


class StageError(Exception):
    """A failure that the user can act on; its text is shown as it is, and it is never retried."""


class Preempted(BaseException):
    """Ends an attempt whose machine is wanted back, right behind a checkpoint.

    Not an `Exception`, so that a stage that catches those does not go on.
    """


@dataclass
class Preemption:
    """Whether the attempt was told to end; set by a signal at any moment."""

    asked: bool = False

    def ask(self) -> None:
        """Tell it to."""
        self.asked = True


def call_text(
    target: str, argument: str | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """Return what a registry name stands for as one text, to compare it.

    Args:
        target: `module:attribute`.
        argument: for a name of a family, what follows the prefix.
        options: with which it is called, where that matters; JSON.
    """
    return json.dumps([target, argument, options], sort_keys=True)


_known_calls: frozenset[str] | None = None  # of the process, so that all its threads are bound


@contextmanager
def only_calls(calls: Iterable[str]) -> Iterator[None]:
    """Let `require_call` accept these alone (see `call_text`), as long as the context lasts."""
    global _known_calls
    before, _known_calls = _known_calls, frozenset(calls)
    try:
        yield
    finally:
        _known_calls = before


def require_call(
    target: str, argument: str | None = None, options: Mapping[str, Any] | None = None
) -> None:
    """Check what a stage is about to import and call, before it does; see `call_text`.

    Files of a store name what builds a network or reads its data. The runner knows what the
    parameters of the cell, and of all cells upstream, stand for; whatever else a file names was put
    there by somebody else. Outside the runner nothing is checked.

    Raises:
        StageError: no parameter of the cell or upstream stands for it.
    """
    known = _known_calls
    if known is None or call_text(target, argument, options) in known:
        return
    named = f"{target!r} to be imported"
    if argument is not None:
        named += f" and called with {argument!r}"
    if options:
        named += f" and given {json.dumps(options, sort_keys=True)[:200]}"
    raise StageError(
        f"a stored file names {named}, which no parameter of this cell or upstream stands for; the "
        "store may have been tampered with."
    )


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One upstream output, as a stage sees it.

    Attributes:
        cell: full cell name, such as `oneshot[method=fishleg,seed=0,sparsity=0.9]`.
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
    """Take an event nowhere: the sink of a context made in a test."""


@dataclass(kw_only=True)
class Context:
    """What a running stage sees of the world.

    A test makes one by hand: `Context(params=..., folder=tmp_path, inputs={...})`.

    Attributes:
        params: the validated parameters.
        folder: the attempt's local folder; holds `outputs/NAME/` and `checkpoints/`.
        inputs: input name -> artifacts, in spec order then cell order (one unless `many`).
        device: "cpu" or "cuda".
        threads: intra-op threads the stage may use (already set for torch by the worker).
        rank: this process's rank, 0 <= rank < world_size. Only rank 0 has the checkpoint to go on
            from, and only it writes: what others put into `folder` is thrown away.
        world_size: number of processes that share the stage.
        rendezvous: where they meet, an `init_method` of torch.distributed; "" if they have met.
        emit: where events go.
        checkpoint_every_s: seconds between in-stage checkpoints, for `checkpoint_due`; more when
            one takes long to write, so that checkpoints take at most a tenth of the time. With 0
            one is due always.
        preemption: whether the attempt is to end at its next checkpoint, which is due at once.
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
        """Return the folder of output `name`, made if need be; it is published at the end."""
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

        A stage asks as often as it could write one: also when it is told to end, one is due.
        """
        waited_s = time.monotonic() - self._last_checkpoint_time
        wait_s = self.checkpoint_every_s and max(self.checkpoint_every_s, 9 * self._writing_s)
        return self.preemption.asked or waited_s >= wait_s

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """Yield an empty folder to write into; it becomes the newest checkpoint on leaving.

        The switch is atomic: a kill at any moment leaves either the old or the new checkpoint
        whole. The one before the newest is kept, older ones are deleted.

        Raises:
            Preempted: the checkpoint is written, and the attempt was told to end.
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
    """Return a value as a float; an integer beyond all floats is infinite, as it is in torch."""
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
