"""Reads a `pipeline.yaml`: from text to connected cells, or to all its problems at once."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.base import limits
from pipeline.base.errors import BadInput, Position, Problem, SpecError, nearest
from pipeline.base.names import store_around
from pipeline.base.places import defaults_folder, lead, moved, tracking_uri
from pipeline.base.secrets import find_secret, has_credentials, redact
from pipeline.base.variables import STORAGE
from pipeline.code.digest import find_module, missing_target
from pipeline.spec import yaml_loader
from pipeline.spec.cells import (
    Cell,
    Registration,
    Scalar,
    StageSpec,
    cell_name,
    expand,
    topological,
)
from pipeline.spec.interpolate import override
from pipeline.spec.params import Issue, Marked, issues_of, marked
from pipeline.spec.resolved import resolved_text
from pipeline.spec.shape import ClusterShape, FileShape, MlflowShape, ResourcesShape, StageShape
from pipeline.spec.yaml_loader import Document, Path
from pipeline.stage import Catalogue, Params, Registry, Resources, Stage

_PLACES: Mapping[str, type[BaseModel]] = {
    "a stage": StageShape,
    "a stage's `resources:`": ResourcesShape,
    "the whole file": FileShape,
    "`mlflow:`": MlflowShape,
    "`cluster:`": ClusterShape,
}

# -------------------------------------------------------------------- what load_spec returns


@dataclass(frozen=True, kw_only=True)
class MlflowSpec:
    """Where runs are tracked; `tracking_uri` None leaves it to the environment."""

    experiment: str
    tracking_uri: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin: the module that holds its catalogue, and the catalogue."""

    module: str
    catalogue: Catalogue


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A pipeline without mistakes.

    Attributes:
        name: the pipeline's name.
        path: the file it is from.
        text: what the file says.
        resolved: the same with all references replaced and all `--set` options applied: a file
            that repeats it.
        environment: the variables that it refers to, with the text that each stands for.
        overrides: the `--set` options.
        plugins: in the file's order.
        storage: absolute path of a folder, or an fsspec URL.
        storage_given: the same as the environment or the file gives it; perhaps a relative path.
        folder: where relative paths in it start, its file's.
        tracking_folder: where `mlflow.db` and `tracking/` lie by default.
        moved: sentences for people whose store lies where it was looked for by earlier versions.
        autoscaling: whether the cluster may grow to meet what stages ask for.
        mlflow: where runs are tracked.
        stages: name -> stage, in the file's order.
        cells: all cells, stages in topological order.
    """

    name: str
    path: FilePath
    text: str
    resolved: str
    environment: Mapping[str, str]
    overrides: Sequence[str]
    plugins: Sequence[Plugin]
    storage: str
    storage_given: str
    folder: FilePath
    tracking_folder: FilePath
    moved: Sequence[str]
    autoscaling: bool
    mlflow: MlflowSpec
    stages: Mapping[str, StageSpec]
    cells: Sequence[Cell]

    def command(self, *arguments: str) -> str:
        """Return the command that runs it, with further arguments, for a shell."""
        settings = [word for option in self.overrides for word in ("--set", option)]
        return shlex.join(["fls", "run", str(self.path), *settings, *arguments])

    def tracking_uri(self, recorded: str | None = None) -> str:
        """Return where MLflow data goes, see `pipeline.base.places.tracking_uri`."""
        return tracking_uri(
            self.mlflow.tracking_uri,
            recorded,
            folder=self.folder,
            default_folder=self.tracking_folder,
        )


def load_spec(
    path: FilePath,
    overrides: Sequence[str] = (),
    folder: FilePath | None = None,
    admit: Callable[[Sequence[str]], None] = lambda plugins: None,
) -> Spec:
    """Read a spec, check all of it, and make its cells.

    The working directory is put on the path of Python's imports, behind what is installed, because
    plugins and the user's own functions are looked for there.

    Args:
        path: the YAML file.
        overrides: `--set` options, see `pipeline.spec.interpolate.override`.
        folder: where relative paths in it start, or None for that of the file.
        admit: is given its plugins before one of them is imported, and raises where that must not
            happen.

    Returns:
        The spec, free of mistakes.

    Raises:
        SpecError: it has mistakes; all of them, in file order.

    A file that cannot be read is `BadInput`. Whatever the file holds, checking it takes less than a
    second (the import of its plugins apart) and bounded memory, see `pipeline.base.limits`.
    """
    text = _read(FilePath(path))
    _refuse_secrets(text, str(path), overrides)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    document = yaml_loader.load(text, str(path))
    if not isinstance(document.value, dict):
        document.note(document.root, "expected a mapping with 'name', 'plugins' and 'stages'")
        raise SpecError(document.problems)
    given = document.value.get("storage"), document.value.get("mlflow")
    environment = override(document, overrides, os.environ)
    path = FilePath(path)
    folder = path.parent if folder is None else folder
    spec = _Builder(document, path, text, folder, admit).build()
    if document.problems:
        raise SpecError(document.problems)
    return dataclasses.replace(
        spec,
        resolved=_resolve(document.value, spec, *given),
        environment=redact(environment),
        overrides=tuple(overrides),
    )


def read_values(path: FilePath) -> FileShape:
    """Return what a spec says, its references replaced; nothing that it names is imported.

    Raises:
        SpecError: it is no YAML, or the top level is not in order.
    """
    document = yaml_loader.load(_read(path), str(path))
    if isinstance(document.value, dict):
        override(document, (), os.environ)
    try:
        shape = FileShape.model_validate(document.value)
    except ValidationError as error:
        for issue in issues_of(error, FileShape, document.value, _PLACES):
            document.note(document.root, issue.message)
        raise SpecError(document.problems) from None
    if document.problems:
        raise SpecError(document.problems)
    return shape


def tracking_folder_of(storage: str, folder: FilePath) -> FilePath:
    """Return where `mlflow.db` and `tracking/` of a spec lie by default.

    Args:
        storage: as the file gives it.
        folder: the file's.
    """
    return folder if STORAGE.read() else defaults_folder(storage, folder)


def _resolve(value: Mapping[str, Any], spec: Spec, storage: Any, mlflow: Any) -> str:
    """Return the text that repeats a spec; an address with a password stays as the file gives it.

    Args:
        value: the spec as data.
        spec: the spec.
        storage: what the file gives as `storage:`.
        mlflow: what it gives as `mlflow:`.
    """
    if has_credentials(spec.storage):
        storage = f"${{env.{STORAGE.name}}}" if STORAGE.read() else storage
    else:
        storage = spec.storage
    changed = {"storage": storage}
    if has_credentials(spec.mlflow.tracking_uri or ""):
        changed["mlflow"] = {**value["mlflow"], "tracking_uri": mlflow["tracking_uri"]}
    return resolved_text({**value, **changed}, spec.path.name)


def _read(path: FilePath) -> str:
    """Return the text of a file, reading no more of it than the limit.

    Raises:
        BadInput: it cannot be read.
        SpecError: it is too large, or is not text.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadInput(f"cannot read {path}: expected a regular file")
        with path.open("rb") as file:
            data = file.read(limits.SPEC_BYTES + 1)
            size = max(len(data), os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read {path}: {reason}. Expected a pipeline file.") from None
    if size > limits.SPEC_BYTES:
        position = Position(str(path), 1, 1)
        message = f"expected a file of at most {limits.SPEC_BYTES:,} bytes, got {size:,}"
        raise SpecError([Problem(position, message)])
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode()) + 1
        position = Position(str(path), before.count(b"\n") + 1, column)
        message = f"expected text in UTF-8, got the byte 0x{data[error.start]:02x}"
        raise SpecError([Problem(position, message)]) from None


def _refuse_secrets(text: str, file: str, overrides: Sequence[str]) -> None:
    """Check that a spec and its `--set` options, which are recorded, hold no secret.

    Raises:
        SpecError: they do.
    """
    problems = []
    for where, given in [(file, text), *(("--set", option) for option in overrides)]:
        found = find_secret(given, os.environ)
        if found is None:
            continue
        at, what = found
        line, column = given.count("\n", 0, at) + 1, at - given.rfind("\n", 0, at)
        position = Position(where, line, column) if where == file else Position(where)
        message = (
            f"expected no secrets, because this is recorded; got {what}. Leave it to the "
            "environment of what needs it, such as MLFLOW_TRACKING_URI or AWS_PROFILE"
        )
        problems.append(Problem(position, message))
    if problems:
        raise SpecError(problems)


# ------------------------------------------------------------------------------ the building


class _Builder:
    """Turns a document into a spec, noting problems in the document on the way."""

    def __init__(
        self,
        document: Document,
        path: FilePath,
        text: str,
        folder: FilePath,
        admit: Callable[[Sequence[str]], None],
    ):
        self.document = document
        self.admit = admit
        self.path = path
        self.text = text
        self.folder = folder
        self.plugins: list[Plugin] = []
        self.types: dict[str, Stage] = {}
        self.unsure: set[str] = set()  # stages whose axes are wrong
        self.wrong: set[Position] = set()  # where the values are that have the wrong shape

    def build(self) -> Spec:
        """Return the spec; it can be used only if the document has no problems afterwards.

        Raises:
            SpecError: the top level is not in order.
        """
        raw = self.document.value
        try:
            shape = FileShape.model_validate(raw)
        except ValidationError as error:
            shape = None
            self.note_issues(error, FileShape, raw, ())
        plugins = _strings(raw.get("plugins"))
        self.admit(plugins)
        for index, module in enumerate(plugins):
            if self.document.position(("plugins", index)) not in self.wrong:
                self.add_plugin(module, ("plugins", index))
        stages = dict(self.stages(raw.get("stages")))
        self.require_few_cells(stages.values())
        params: dict[str, Params] = {}
        for stage in stages.values():
            params |= self.stage_params(stage)
        self.check_keep(stages)
        order, cycles = topological(stages)
        for cycle in cycles:
            self.note_cycle(cycle, stages[cycle[-1]])
        cells = expand({name: stages[name] for name in order}, params, self.note_join)
        if shape is None:
            raise SpecError(self.document.problems)
        given = STORAGE.read()
        storage = given or shape.storage
        place = lead(storage, "" if given else self.folder)
        tracking_folder = tracking_folder_of(storage, self.folder)
        return Spec(
            name=shape.name,
            path=self.path,
            text=self.text,
            resolved="",
            environment={},
            overrides=(),
            plugins=self.plugins,
            storage=place if "://" in place else os.path.abspath(place),
            storage_given=storage,
            folder=self.folder,
            tracking_folder=tracking_folder,
            moved=[] if given else moved(storage, self.folder, tracking_folder),
            autoscaling=shape.cluster.autoscaling,
            mlflow=MlflowSpec(
                experiment=shape.mlflow.experiment or shape.name,
                tracking_uri=shape.mlflow.tracking_uri,
            ),
            stages=stages,
            cells=cells,
        )

    def require_few_cells(self, stages: Iterable[StageSpec]) -> None:
        """Check how many cells there would be, before any is made.

        Raises:
            SpecError: too many; nothing more can be said about the spec then.
        """
        total = 0
        for stage in stages:
            total += stage.count_cells()
            if total > limits.CELLS:
                self.note(
                    ("stages", stage.name, "matrix"),
                    f"expected at most {limits.CELLS:,} cells in a pipeline, got {total:,} up to "
                    f"this stage, which has {stage.count_cells():,}",
                )
                raise SpecError(self.document.problems)

    # -- plugins

    def add_plugin(self, name: str, path: Path) -> None:
        """Import a plugin's catalogue."""
        try:
            plugin = import_catalogue(name)
        except (Exception, SystemExit) as error:  # any: it is the plugin author's code that runs
            self.note(path, f"cannot import plugin {name!r}: {type(error).__name__}: {error}")
            return
        if plugin is None:
            self.note(path, f"plugin {name!r} has no CATALOGUE, nor has {name}.catalogue")
            return
        self.plugins.append(plugin)
        for stage in plugin.catalogue.stages:
            if stage.name in self.types:
                self.note(path, f"plugin {name!r}: another plugin has a stage {stage.name!r} too")
            self.types[stage.name] = stage

    # -- stages

    def stages(self, raw: Any) -> Iterator[tuple[str, StageSpec]]:
        """Yield the stages whose own entries are in order."""
        for name, entry in raw.items() if isinstance(raw, dict) else ():
            shape = self.stage_shape(name, entry)
            if shape is None:
                continue
            declaration = self.types.get(shape.uses)
            if declaration is None:
                if len(self.plugins) == len(_strings(self.document.value.get("plugins"))):
                    self.note(
                        ("stages", name, "uses"),
                        f"unknown stage type {shape.uses!r}{nearest(shape.uses, self.types)}; "
                        f"known: {', '.join(self.types)}",
                    )
                continue
            yield (
                name,
                StageSpec(
                    name=name,
                    declaration=declaration,
                    matrix=self.matrix(name, shape, declaration),
                    inputs=self.inputs(name, shape, declaration, raw),
                    params=shape.params,
                    resources=self.resources(name, shape, declaration),
                    retries=shape.retries,
                    timeout_s=shape.timeout_s,
                    checkpoint_every_s=shape.checkpoint_every_s,
                    log_bytes=shape.log_bytes,
                    keep=shape.keep,
                    registration=self.registration(name, shape, declaration),
                ),
            )

    def stage_shape(self, name: str, entry: Any) -> StageShape | None:
        """Read a stage's own keys; those that are wrong are noted, then taken as not given."""
        try:
            return StageShape.model_validate(entry)
        except ValidationError as error:
            wrong = self.note_issues(error, StageShape, entry, ("stages", name))
        if "matrix" in wrong:
            self.unsure.add(name)
        if not isinstance(entry, dict) or "uses" in wrong or "uses" not in entry:
            return None
        right = {key: value for key, value in entry.items() if key not in wrong}
        return StageShape.model_validate(right)

    def matrix(
        self, name: str, shape: StageShape, declaration: Stage
    ) -> dict[str, Sequence[Scalar]]:
        """Return the axes that are parameters of the stage type."""
        known = declaration.params.model_fields
        axes: dict[str, Sequence[Scalar]] = {}
        for axis, values in shape.matrix.items():
            path = ("stages", name, "matrix", axis)
            if axis not in known:
                hint = nearest(axis, known) or f"; parameters: {', '.join(known) or 'none'}"
                message = f"axis {axis!r} is no parameter of {declaration.name!r}{hint}"
                self.note(path, message, key=True)
                self.unsure.add(name)
                continue
            if axis in shape.params:
                self.note(path, f"{axis!r} is given in 'params' too; keep one", key=True)
            axes[axis] = values
        return axes

    def inputs(
        self, name: str, shape: StageShape, declaration: Stage, stages: Mapping[str, Any]
    ) -> dict[str, list[str]]:
        """Return the declared inputs that are connected."""
        root = ("stages", name, "inputs")
        if stages[name].get("inputs") and not shape.inputs:
            return {}  # what is there could not be read
        connected: dict[str, list[str]] = {}
        for key, upstream in shape.inputs.items():
            declared = declaration.inputs.get(key)
            if declared is None:
                known = declaration.inputs
                hint = nearest(key, known) or f"; inputs: {', '.join(known) or 'none'}"
                self.note(
                    (*root, key),
                    f"{declaration.name!r} has no input {key!r}{hint}",
                    key=True,
                )
                continue
            if len(upstream) > 1 and not declared.many:
                self.note((*root, key), f"input {key!r} takes one stage, got {len(upstream)}")
            for index, other in enumerate(upstream):
                if other not in stages:
                    self.note(
                        (*root, key, index),
                        f"{name!r} depends on a stage that is not there: {other!r}"
                        f"{nearest(other, stages) or '; stages: ' + ', '.join(stages)}",
                    )
                elif other in upstream[:index]:
                    self.note((*root, key, index), f"{other!r} is listed more than once")
            connected[key] = list(dict.fromkeys(upstream))
        for key, declared in declaration.inputs.items():
            if key not in shape.inputs and not declared.optional:
                where = root if shape.inputs else root[:-1]
                self.note(where, f"missing input {key!r}: a {declared.kind!r}", key=True)
        return connected

    def check_keep(self, stages: Mapping[str, StageSpec]) -> None:
        """Note stages whose files are results, and yet are not to be kept."""
        taken = {
            other for stage in stages.values() for one in stage.inputs.values() for other in one
        }
        for name, stage in stages.items():
            if stage.keep == "results" and name not in taken:
                message = f"no stage takes anything from {name!r}, so its files are results"
                self.note(("stages", name, "keep"), f"keep: results: {message}; leave it out")

    def registration(self, name: str, shape: StageShape, declaration: Stage) -> Registration | None:
        """Return how the stage's models are registered, if they are to be."""
        if shape.registered is None:
            return None
        (catalogue,) = (
            plugin.catalogue for plugin in self.plugins if declaration in plugin.catalogue.stages
        )
        for output, declared in declaration.outputs.items():
            if catalogue.loader and declared.kind == catalogue.exports:
                return Registration(name=shape.registered, output=output, loader=catalogue.loader)
        self.note(
            ("stages", name, "register"),
            f"{declaration.name!r} gives nothing that can be registered"
            + (f": no {catalogue.exports!r}" if catalogue.loader else ""),
            key=True,
        )
        return None

    def resources(self, name: str, shape: StageShape, declaration: Stage) -> Resources:
        """Return what a cell needs: the stage type's own resources, as changed by the spec."""
        changes = shape.resources.model_dump(exclude_none=True)
        if "memory" in changes:
            changes["memory_bytes"] = changes.pop("memory")
        wanted = dataclasses.replace(declaration.resources, workers=shape.workers, **changes)
        if wanted.workers > 1 and not declaration.parallel:
            able = ", ".join(one.name for one in self.types.values() if one.parallel)
            self.note(
                ("stages", name, "workers"),
                f"{declaration.name!r} runs in one process; several workers are for "
                f"{able or 'stage types that declare it, and there is none'}",
            )
        elif wanted.workers > 1 and not float(wanted.num_gpus).is_integer():
            self.note(
                ("stages", name, "workers"),
                f"workers cannot share a GPU: expected num_gpus to be a whole number, got "
                f"{wanted.num_gpus:g}",
            )
        return wanted

    # -- parameters

    def stage_params(self, stage: StageSpec) -> dict[str, Params]:
        """Return cell name -> validated parameters of the cells that have valid ones."""
        found: dict[str, Params] = {}
        for point in stage.points():
            values = {**stage.params, **point}
            name = cell_name(stage.name, point)
            if len(name) > limits.CELL_NAME_CHARACTERS:
                self.note(
                    ("stages", stage.name, "matrix"),
                    f"expected names of cells of at most {limits.CELL_NAME_CHARACTERS} characters, "
                    f"got {len(name)}: {name}",
                )
            model = stage.declaration.params
            try:
                params = model.model_validate(values)
            except ValidationError as error:
                issues = issues_of(error, model, values)
                for issue in issues:
                    if not self.follows_from_matrix(stage.name, issue):
                        self.note_param(stage, point, issue)
                wrong = {issue.path[0] for issue in issues if issue.path}
                right = {key: value for key, value in values.items() if key not in wrong}
                params = model.model_construct(**right)  # its names can be checked all the same
            else:
                found[name] = params
            for mark in marked(params):
                message = _name_trouble(mark)
                if message:
                    self.note_param(stage, point, Issue(mark.path, message))
        return found

    def follows_from_matrix(self, stage: str, issue: Issue) -> bool:
        """Tell whether a parameter is missing only because its axis could not be read."""
        given = self.document.value["stages"][stage].get("matrix")
        axes = given if stage in self.unsure and isinstance(given, dict) else ()
        return any(issue.message == f"missing key {axis!r}" for axis in axes)

    def note_param(self, stage: StageSpec, point: Mapping[str, Scalar], issue: Issue) -> None:
        """Note a problem with a parameter, where the file gives it: in `params` or `matrix`."""
        root: Path = ("stages", stage.name)
        first = issue.path[0] if issue.path else None
        if first in point:
            index = list(stage.matrix[str(first)]).index(point[str(first)])
            self.note((*root, "matrix", str(first), index), issue.message)
        elif stage.params:
            self.note((*root, "params", *issue.path), issue.message, key=issue.key)
        else:
            self.note(root, issue.message, key=True)

    # -- problems

    def note_cycle(self, cycle: Sequence[str], last: StageSpec) -> None:
        """Note a cycle, where the stage that closes it takes its input."""
        key = next(key for key, upstream in last.inputs.items() if cycle[-2] in upstream)
        self.note_input(last.name, key, cycle[-2], f"the stages form a cycle: {' -> '.join(cycle)}")

    def note_join(self, stage: str, key: str, upstream: str, message: str) -> None:
        """Note cells that do not join, unless that follows from axes that are wrong."""
        if self.unsure.isdisjoint((stage, upstream)):
            self.note_input(stage, key, upstream, message)

    def note_input(self, stage: str, key: str, upstream: str, message: str) -> None:
        """Note a problem with what input `key` of `stage` takes from `upstream`."""
        given = self.document.value["stages"][stage]["inputs"][key]
        path: Path = ("stages", stage, "inputs", key)
        self.note((*path, given.index(upstream)) if isinstance(given, list) else path, message)

    def note(self, path: Path, message: str, *, key: bool = False) -> None:
        """Note a problem at `path`, unless the value there could not even be read."""
        position = self.document.position(path, key=key)
        if position not in self.document.unknown:
            self.document.add(Problem(position, message))

    def note_issues(
        self, error: ValidationError, model: type[BaseModel], values: Any, path: Path
    ) -> set[str | int]:
        """Note what is wrong with the `values` at `path`; return their keys that are."""
        issues = issues_of(error, model, values, _PLACES)
        for issue in issues:
            self.note((*path, *issue.path), issue.message, key=issue.key)
            self.wrong.add(self.document.position((*path, *issue.path)))
        return {issue.path[0] for issue in issues if issue.path}


def import_catalogue(name: str) -> Plugin | None:
    """Return the CATALOGUE of the module `name.catalogue`, or of `name` if that is not there.

    Raises:
        ImportError: the module lies in a store.
    """
    inner = f"{name}.catalogue"
    chosen = inner if find_module(inner) else name
    place = find_module(chosen)
    store = store_around(place.file) if place and place.file else None
    if store:
        raise ImportError(f"it lies in the store {store}, from which no code is taken")
    module = importlib.import_module(chosen)
    found = getattr(module, "CATALOGUE", None)
    return Plugin(module=module.__name__, catalogue=found) if found is not None else None


def _name_trouble(mark: Marked) -> str | None:
    """Return what is wrong with the name or file that a parameter gives, or None."""
    name = str(mark.path[-1])
    if isinstance(mark.marker, Registry):
        registry = mark.marker
        if mark.value in registry.renamed:
            return f"{name}: {mark.value!r} is now {registry.renamed[mark.value]!r}"
        entry = registry.find(mark.value)
        if entry is None:
            known = list(registry.entries) + [f"{prefix}..." for prefix in registry.prefixes]
            return (
                f"{name}: unknown {registry.kind} {mark.value!r}"
                f"{nearest(mark.value, registry.entries)}; known: {', '.join(known)}"
                f"{', or package.module:function' if registry.open else ''}"
            )
        return missing_target(entry.target) if entry.target == mark.value else None
    if not os.path.isfile(mark.value):
        return f"{name}: no file {mark.value!r} (looked for from {os.getcwd()})"
    return None


def _strings(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
