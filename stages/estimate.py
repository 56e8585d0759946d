"""A curvature estimate as stages exchange it, and the recipe that builds one.

On disk, a folder: `curvature.safetensors` (the estimator's tensors) and `curvature.json` (its
recipe, calibration samples and certificate).
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
from fishleg.options.earlier import present_method
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
    """The recipe of an estimator.

    Attributes:
        method: the class or function that builds it.
        damping: gamma, added to the Fisher's diagonal.
        options: further keyword arguments.
        calibration: the samples of its fit.
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
        """Return the recipe that `to_json` described, also in an earlier version."""
        method, options = _present(Reference(**value["method"]), value["options"])
        return cls(
            method=method,
            damping=value["damping"],
            options=options,
            calibration=CalibrationPlan(**value["calibration"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able description."""
        return asdict(self)

    def facts(self, *, mode: str, target: float) -> dict[str, Any]:
        """Return the facts of a model that an estimate of this recipe pruned to `target`."""
        return {
            "method": self.method.name,
            "damping": self.damping,
            "structure": self.options.get("structure"),
            "mode": mode,
            "target": target,
            "finetuned": False,
        }

    def build(self, partition: Partition) -> AbstractEstimator:
        """Return an estimator, not fitted yet.

        Raises:
            StageError: an option is unknown, or a value is out of range.
        """
        try:
            return self.method.load()(partition, damping=self.damping, **self.options)
        except (FishLegError, TypeError, ValueError) as error:
            raise StageError(f"curvature method {self.method.name!r}: {error}") from error


def _present(method: Reference, options: Mapping[str, Any]) -> tuple[Reference, Mapping[str, Any]]:
    """Return a stored method and its options under their present names."""
    if method.target != "fishleg.estimators:FishLeg":
        return method, options
    name, renamed = present_method("fishleg", options)
    if name == "eigen":
        method = Reference(name=name, target="fishleg.estimators:Eigen")
    return method, renamed


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the library's errors, whose texts give the remedy, into errors for the user.

    Raises:
        StageError: in place of a FishLegError.
    """
    try:
        yield
    except FishLegError as error:
        raise StageError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class StoredEstimate:
    """A fitted estimate with its origin, as a curvature folder holds them.

    Attributes:
        estimator: fitted.
        recipe: of the estimator.
        step: the same for the lineage of the models that it prunes.
        model_key: key of the cell that made the fitted model.
    """

    estimator: AbstractEstimator
    recipe: Recipe
    step: Step
    model_key: str


def save_estimate(folder: Path, made: StoredEstimate, certificate: Any) -> None:
    """Write a curvature folder, with the certificate as JSON, or None."""
    state = made.estimator.state_dict()
    save_tensors(folder / "curvature.safetensors", state["tensors"])
    facts = {
        "meta": state["meta"],
        "recipe": made.recipe.to_json(),
        "step": made.step.to_json(),
        "model_key": made.model_key,
        "certificate": certificate,
    }
    write_json(folder / "curvature.json", facts)


def load_estimate(folder: Path, partition: Partition, device: str) -> StoredEstimate:
    """Return the estimate in a curvature folder, with its tensors on `device`."""
    facts = json.loads((folder / "curvature.json").read_text("utf-8"))
    recipe = Recipe.from_json(facts["recipe"])
    estimator = recipe.build(partition)
    tensors = load_tensors(folder / "curvature.safetensors", device)
    estimator.load_state_dict({"tensors": tensors, "meta": facts["meta"]})
    # estimates from before there were lineages have no step
    step = facts.get("step", Step(stage="curvature", params=facts["recipe"]).to_json())
    return StoredEstimate(
        estimator=estimator,
        recipe=recipe,
        step=Step.from_json(step),
        model_key=facts["model_key"],
    )
