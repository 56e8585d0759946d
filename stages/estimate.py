"""A curvature estimate as it passes between stages, and how one is made and fitted.

On disk, a folder: `curvature.safetensors` (the estimator's tensors) and `curvature.json` (how to
build it, the samples it was fitted on, its certificate).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fishleg.errors import FishLegError
from fishleg.estimators.base import AbstractEstimator
from fishleg.gradients.rank_group import RankGroup
from fishleg.parameters import Partition
from pipeline.stage import StageError, write_json
from stages.calibration import CalibrationPlan
from stages.lineage import Step
from stages.reference import Reference, refer
from stages.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from stages.catalogue import EstimatorParams


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an estimator is built.

    Attributes:
        method: what builds it.
        damping: gamma, added to the Fisher's diagonal.
        options: further keyword arguments.
        calibration: the samples it is fitted on.
    """

    method: Reference
    damping: float
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: CalibrationPlan

    @classmethod
    def from_params(cls, params: EstimatorParams) -> Recipe:
        """Return the recipe that a stage's parameters describe."""
        return cls(
            method=refer(params, "method"),
            damping=params.damping,
            options=params.method_options(),
            calibration=CalibrationPlan.taken_from(params),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Return the recipe that `to_json` described."""
        return cls(
            method=Reference(**value["method"]),
            damping=value["damping"],
            options=value["options"],
            calibration=CalibrationPlan(**value["calibration"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able description."""
        return asdict(self)

    def facts(self, *, mode: str, target: float) -> dict[str, Any]:
        """Return the facts of a model that was pruned to `target` by an estimate made like this."""
        return {
            "method": self.method.name,
            "damping": self.damping,
            "structure": self.options.get("structure"),
            "mode": mode,
            "target": target,
            "finetuned": False,
        }

    def build(self, partition: Partition) -> AbstractEstimator:
        """Return an estimator that is not fitted yet.

        Raises:
            StageError: an option is unknown, or its value out of range.
        """
        try:
            return self.method.load()(partition, damping=self.damping, **self.options)
        except (FishLegError, TypeError, ValueError) as error:
            raise StageError(f"curvature method {self.method.name!r}: {error}") from error


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the library's own errors, whose texts say what to do, into errors for the user.

    Raises:
        StageError: in place of a FishLegError.
    """
    try:
        yield
    except FishLegError as error:
        raise StageError(str(error)) from error


def save_state(folder: Path, estimator: AbstractEstimator, **facts: Any) -> None:
    """Write an estimator's state, finished or not, and facts about it."""
    state = estimator.state_dict()
    save_tensors(folder / "curvature.safetensors", state["tensors"])
    write_json(folder / "curvature.json", {"meta": state["meta"], **facts})


def load_state(folder: Path, estimator: AbstractEstimator, device: str) -> None:
    """Restore an estimator's state onto `device`."""
    meta = json.loads((folder / "curvature.json").read_text("utf-8"))["meta"]
    tensors = load_tensors(folder / "curvature.safetensors", device)
    estimator.load_state_dict({"tensors": tensors, "meta": meta})


def share_state(rank_group: RankGroup, estimator: AbstractEstimator, device: str) -> None:
    """Give all of a rank group the state that the estimator of its first process has."""
    state = estimator.state_dict()
    tensors, meta = rank_group.broadcast(state["tensors"], state["meta"], device=device)
    estimator.load_state_dict({"tensors": tensors, "meta": meta})


@dataclass(frozen=True, kw_only=True)
class StoredEstimate:
    """What a curvature folder holds.

    Attributes:
        estimator: fitted.
        recipe: how it was made.
        step: the same for the lineage of what is made by it.
        model_key: key of the cell whose model it was fitted on.
    """

    estimator: AbstractEstimator
    recipe: Recipe
    step: Step
    model_key: str


def load_estimate(folder: Path, partition: Partition, device: str) -> StoredEstimate:
    """Return the estimate in a curvature folder."""
    facts = json.loads((folder / "curvature.json").read_text("utf-8"))
    recipe = Recipe.from_json(facts["recipe"])
    estimator = recipe.build(partition)
    load_state(folder, estimator, device)
    # those made before there were lineages have no step
    step = facts.get("step", Step(stage="curvature", params=facts["recipe"]).to_json())
    return StoredEstimate(
        estimator=estimator,
        recipe=recipe,
        step=Step.from_json(step),
        model_key=facts["model_key"],
    )
