"""A pipeline without mistakes: its settings, its stages and its cells."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.places import tracking_uri
from pipeline.spec.cells import Cell, StageSpec
from pipeline.spec.plugins import Plugin


@dataclass(frozen=True, kw_only=True)
class MlflowSpec:
    """Experiment and address of tracking; `tracking_uri` None means the default."""

    experiment: str
    tracking_uri: str | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A pipeline without mistakes.

    Attributes:
        name: the pipeline's name.
        path: its file.
        text: the text of the file.
        resolved: the text with all references replaced and all `--set` options applied.
        environment: the variables that it refers to, with their values.
        overrides: the `--set` options.
        plugins: in the file's order.
        storage: absolute path of a folder, or an fsspec URL.
        storage_given: the storage as the environment or the file gives it, perhaps relative.
        folder: origin of relative paths.
        tracking_folder: default folder of `mlflow.db` and `tracking/`.
        moved: hints about a store where earlier versions put it.
        autoscaling: whether the cluster may grow to provide the stages' resources.
        mlflow: experiment and address of tracking.
        stages: name -> stage, in the file's order.
        cells: all cells, stages in topological order.
    """

    name: str
    path: Path
    text: str
    resolved: str
    environment: Mapping[str, str]
    overrides: Sequence[str]
    plugins: Sequence[Plugin]
    storage: str
    storage_given: str
    folder: Path
    tracking_folder: Path
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
        """Return MLflow's address, see `pipeline.base.places.tracking_uri`."""
        return tracking_uri(
            self.mlflow.tracking_uri,
            recorded,
            folder=self.folder,
            default_folder=self.tracking_folder,
        )
