"""Builds a spec with connected cells from the data of a pipeline file, and notes all problems."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.base import limits
from pipeline.base.errors import Position, Problem, SpecError, nearest
from pipeline.base.places import lead, moved, tracking_folder_of
from pipeline.base.variables import STORAGE
from pipeline.spec.cells import Registration, Scalar, StageSpec, cell_name
from pipeline.spec.joins import expand, topological
from pipeline.spec.params import Issue, issues_of, marked, name_trouble
from pipeline.spec.plugins import Plugin, import_catalogue
from pipeline.spec.shape import PLACES, FileShape, StageShape
from pipeline.spec.spec import MlflowSpec, Spec
from pipeline.spec.yaml_loader import Document, Path
from pipeline.stage import Params, Resources, Stage


class Builder:
    """Turns a document into a spec, and adds problems to the document."""

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
        self.unsure: set[str] = set()  # stages with invalid axes
        self.wrong: set[Position] = set()  # values of the wrong shape

    def build(self) -> Spec:
        """Return the spec, usable only if the document has no problems afterwards.

        Raises:
            SpecError: the top level has mistakes.
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
        """Check the number of cells before they are made.

        Raises:
            SpecError: too many, with all problems so far.
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
        except (Exception, SystemExit) as error:  # runs the plugin author's code
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
        """Yield the stages with valid entries."""
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
        """Read a stage's own keys; invalid ones are noted and left out."""
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
            return {}  # unreadable
        connected: dict[str, list[str]] = {}
        for key, upstream in shape.inputs.items():
            declared = declaration.inputs.get(key)
            if declared is None:
                known = declaration.inputs
                hint = nearest(key, known) or f"; inputs: {', '.join(known) or 'none'}"
                self.note(
                    (*root, key), f"{declaration.name!r} has no input {key!r}{hint}", key=True
                )
                continue
            if len(upstream) > 1 and not declared.many:
                self.note((*root, key), f"input {key!r} takes one stage, got {len(upstream)}")
            for index, other in enumerate(upstream):
                if other not in stages:
                    self.note(
                        (*root, key, index),
                        f"{name!r} depends on a missing stage: {other!r}"
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
        """Note stages whose files are results but would not be kept."""
        taken = {
            other for stage in stages.values() for one in stage.inputs.values() for other in one
        }
        for name, stage in stages.items():
            if stage.keep == "results" and name not in taken:
                message = f"no stage takes anything from {name!r}, so its files are results"
                self.note(("stages", name, "keep"), f"keep: results: {message}; leave it out")

    def registration(self, name: str, shape: StageShape, declaration: Stage) -> Registration | None:
        """Return the registration of the stage's models, if the spec asks for it."""
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
        """Return a cell's resources: those of the stage type, as changed by the spec."""
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
                params = model.model_construct(**right)  # to check its names
            else:
                found[name] = params
            for mark in marked(params):
                message = name_trouble(mark)
                if message:
                    self.note_param(stage, point, Issue(mark.path, message))
        return found

    def follows_from_matrix(self, stage: str, issue: Issue) -> bool:
        """Tell whether a parameter is missing only because its axis is unreadable."""
        given = self.document.value["stages"][stage].get("matrix")
        axes = given if stage in self.unsure and isinstance(given, dict) else ()
        return any(issue.message == f"missing key {axis!r}" for axis in axes)

    def note_param(self, stage: StageSpec, point: Mapping[str, Scalar], issue: Issue) -> None:
        """Note a problem with a parameter at its place in `params` or `matrix`."""
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
        """Note a cycle at the input that closes it."""
        key = next(key for key, upstream in last.inputs.items() if cycle[-2] in upstream)
        self.note_input(last.name, key, cycle[-2], f"the stages form a cycle: {' -> '.join(cycle)}")

    def note_join(self, stage: str, key: str, upstream: str, message: str) -> None:
        """Note cells that do not join, unless invalid axes are the cause."""
        if self.unsure.isdisjoint((stage, upstream)):
            self.note_input(stage, key, upstream, message)

    def note_input(self, stage: str, key: str, upstream: str, message: str) -> None:
        """Note a problem with `upstream` at input `key` of `stage`."""
        given = self.document.value["stages"][stage]["inputs"][key]
        path: Path = ("stages", stage, "inputs", key)
        self.note((*path, given.index(upstream)) if isinstance(given, list) else path, message)

    def note(self, path: Path, message: str, *, key: bool = False) -> None:
        """Note a problem at `path`, unless the value there is unreadable."""
        position = self.document.position(path, key=key)
        if position not in self.document.unknown:
            self.document.add(Problem(position, message))

    def note_issues(
        self, error: ValidationError, model: type[BaseModel], values: Any, path: Path
    ) -> set[str | int]:
        """Note the problems of the `values` at `path`; return their invalid keys."""
        issues = issues_of(error, model, values, PLACES)
        for issue in issues:
            self.note((*path, *issue.path), issue.message, key=issue.key)
            self.wrong.add(self.document.position((*path, *issue.path)))
        return {issue.path[0] for issue in issues if issue.path}


def _strings(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
