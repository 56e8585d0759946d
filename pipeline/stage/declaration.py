"""Declarations of stages: parameters, registries, inputs, outputs, resources, catalogues."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core.core_schema import no_info_after_validator_function

from pipeline.stage.errors import StageError


class Params(BaseModel):
    """Base of every stage's parameters: unknown keys refused, types strict, frozen.

    Use `list`, not `tuple`, for sequences (YAML has lists). Every field has a `description`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name of a registry.

    Attributes:
        target: `module:attribute` that the name means; its code enters the key of each cell that
            uses the name.
        digest: hex sha256 of the entry's data (a data set's decoded arrays), or None.
        folder: for data without a declared digest: maps the name to the folder that holds them on
            this machine. Its digest enters the key where the planner finds the folder, and workers
            compare it.
        sizes: numbers for estimates, for example `{"parameters": 272474}`.
        summary: one line for listings.
    """

    target: str
    digest: str | None = None
    folder: Callable[[str], Path] | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True, eq=False)  # hashed by identity, as `Annotated[...] | None` demands
class Registry:
    """Names that a parameter may take, each of which means a `module:attribute`.

    Attach it to a field as `Annotated[str, REGISTRY]`. The runner then checks the value, suggests
    the nearest name, and lets the code (and data digest) behind the name enter the cell's key.

    Attributes:
        kind: the kind of thing that a name means, in the singular: "model", "data set".
        entries: name -> Entry.
        open: also accept `package.module:function` of the user's own.
        prefixes: prefix -> Entry for families of names, for example `{"torchvision/": Entry(...)}`.
        data: whether the names mean data; if no digest of them can enter the key, the plan says
            "data not checked".
        verified_by: name of a sibling parameter that is false where a declared digest is not
            compared; "" for none.
        options: name of a sibling parameter that holds keyword arguments for the target; "" for
            none.
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
        """Return the rest of a name after its family's prefix, or None without a family."""
        if name in self.entries:
            return None
        families = (prefix for prefix in self.prefixes if name.startswith(prefix))
        return next((name.removeprefix(prefix) for prefix in families), None)

    def find(self, name: str) -> Entry | None:
        """Return the entry of `name`, or None for an unknown name."""
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

    def load(self, name: str) -> Any:
        """Import and return the object behind `name`.

        Raises:
            StageError: the name is not in the registry.
        """
        entry = self.find(name)
        if entry is None:
            raise StageError(
                f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self.entries))}"
            )
        module, _, attribute = entry.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class ExternalFile:
    """Marks a string parameter as the path of a file whose sha256 enters the key.

    Use as `Annotated[str, ExternalFile()]`. Relative paths start at the working directory; `~` is
    the home folder.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of such a string, whose value is the expanded path."""
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
        kind: the kind of its content; an `Input` of the same kind takes it.
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
    """The demands of a cell: `workers` processes at once, each with all other values.

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
        name: the value of `uses:`.
        entry: `module:function` taking a `Context`.
        params: the parameter model.
        inputs: input name -> Input.
        outputs: output name -> Output. The spec's `inputs: {model: pretrain}` takes the upstream's
            only output of the kind that the input wants.
        resources: defaults; the spec's `resources:` overrides them key by key.
        estimate: forecast from the resolved parameters, and those of all cells upstream (nearest
            first), or None.
        parallel: whether several processes may run a cell as a rank group, with the result of one
            up to rounding; the spec's `workers:` is their number.
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
    """The form of this plugin's results, for `fls results` and the closing table.

    Attributes:
        kind: kind of the output folders that hold `rows.json`, a list of flat objects; a row names
            the model it is about by `model_cell` and `key` (the model cell's).
        columns: the columns of `fls results`, in order; the runner fills `cell` and `run_id`.
        further: fields of rows that only JSON shows.
        before: column -> its name in rows of earlier versions.
        report: kind of the output folder that holds `table.md`, `table.csv` and `figure.png`.
    """

    kind: str
    columns: Sequence[str]
    report: str
    further: Sequence[str] = ()
    before: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Lines that `fls plan` prints about stored outputs of one kind.

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
    """The stages and registries of a plugin module, as its attribute `CATALOGUE`.

    Attributes:
        stages: the stage types.
        packages: top-level packages whose code belongs to the stages (it enters the keys).
        results: the form of the results, or None.
        exporter: `module:function` for `fls export`, taking (output folder: Path, destination:
            Path); writes a user's copy of an output of kind `exports`.
        exports: the kind of output that `fls export` copies, and that can be registered.
        loader: `module:function` for a stage's `register:`, taking (output folder: Path); returns
            an output of kind `exports` as a `torch.nn.Module`, and a NumPy array as an example of
            its input, with several samples, so that the exported model takes any number.
        inspector: `module:function` for `fls inspect`, called in a process of its own: takes
            cell name -> parameters of the cells of the types in `inspects`, and returns a list of
            JSON objects with `cells`, `title`, `columns`, `rows` and `totals`.
        inspects: stage types that the inspector takes.
        notes: lines that `fls plan` prints about outputs.
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
