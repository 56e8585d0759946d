"""Parameters of pruning, in one step and in several."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, model_validator

from fishleg.options import (
    BATCHWISE,
    ESTIMATOR_OPTIONS,
    AdmmOptions,
    PruningOptions,
    RefinementMethod,
    RefinementOptions,
    Schedule,
)
from pipeline.stage import Params
from stages.catalogue.declared import OptionParams, reset
from stages.catalogue.parameters.axes import MethodAxes, Seed
from stages.catalogue.parameters.curvature import EstimatorParams, RefinedFishLegParams
from stages.catalogue.parameters.training import TrainingParams
from stages.lineage import Role


class AdmmParams(OptionParams, AdmmOptions):
    """Options of the selection `admm`."""


class PruningParams(OptionParams, PruningOptions):
    """Options of a pruning step."""

    admm: AdmmParams = Field(default=AdmmParams(), description="options of the selection admm")

    norms: Literal["kept", "reestimated", "augmented"] = Field(
        default="kept",
        description="batch norms after a step: as they were, or measured again on the calibration "
        "samples, without labels; augmented as in training, or as they are",
    )

    @model_validator(mode="after")
    def _forget_admm(self) -> PruningParams:
        if self.selection != "admm":
            reset(self, "admm")
        return self


class TargetParams(MethodAxes):
    """A sparsity, or a budget."""

    sparsity: Annotated[float | None, Role.TARGET] = Field(
        default=None, ge=0, lt=1, description="fraction of the prunable weights removed"
    )
    within: float | None = Field(
        default=None,
        ge=0,
        description="instead of a sparsity: the highest one that costs at most this many points "
        "of accuracy on the validation split",
    )
    seed: Seed = Field(default=0, ge=0, description="axis: the inputs' seed")

    @model_validator(mode="after")
    def _one_target(self) -> TargetParams:
        if (self.sparsity is None) == (self.within is None):
            raise ValueError("give either `sparsity` or `within`")
        return self


class OneshotParams(PruningParams, TargetParams):
    """Parameters of `prune_oneshot`; a budget is met by bisection."""

    certificate_samples: Annotated[int, Role.NEUTRAL] = Field(
        default=250,
        ge=0,
        description="calibration samples on which predicted and measured change are compared; "
        "0: none",
    )


class StepwiseParams(PruningParams, EstimatorParams):
    """Parameters of pruning in steps."""

    sparsity: Annotated[float, Role.TARGET] = Field(
        gt=0, lt=1, description="fraction removed after the last step"
    )
    initial_sparsity: float = Field(
        default=0.0, ge=0, lt=1, description="sparsity where the schedule begins"
    )
    steps: int = Field(default=8, ge=1, description="number of pruning steps")
    schedule: Schedule = Field(
        default="cubic",
        description="fast at first and slow at the end; equal steps; or equal fractions of the "
        "remaining weights",
    )
    stops: list[float] = Field(
        default=[],
        description="sparsities after each step but the last, in place of a schedule",
    )
    carry: Literal["refine", "reestimate"] = Field(
        default="refine",
        description="between steps: refine the estimate with the new weights and masks, or start "
        "again (methods without a state always do)",
    )
    seed: Seed = Field(default=0, ge=0, description="seed of samples, labels, batches and crops")

    @model_validator(mode="after")
    def _admm_by_the_full_fisher(self) -> StepwiseParams:
        several = len(self.stops) > 0 or self.steps > 1
        if self.selection == "admm" and several and self.carry == "refine":
            raise ValueError(
                "selection: admm expects an estimate of the full Fisher in each step, got carry: "
                "refine, which has it for survivors alone; set carry: reestimate"
            )
        return self

    @model_validator(mode="after")
    def _rising(self) -> StepwiseParams:
        rising = [0.0, *self.stops, self.sparsity]
        if any(not low < high for low, high in pairwise(rising)):
            raise ValueError(
                f"stops: expected to rise from above 0 to below sparsity, got {rising}"
            )
        return self


class OnlineParams(Params):
    """Options of curvature that rides on training."""

    every: int = Field(
        default=10, ge=1, description="training steps from one update of the estimate to the next"
    )
    samples: int = Field(
        default=32, ge=1, description="samples of a training batch that an update takes, at most"
    )


class GradualParams(StepwiseParams, TrainingParams):
    """Parameters of `prune_gradual`."""

    curvature: Literal["steps", "online"] = Field(
        default="steps",
        description="the estimate is updated before each pruning step, as `carry` says; or online, "
        "by batches of the training between the steps (fls, and running means of kfac, obs and "
        "diagonal)",
    )
    online: OnlineParams = Field(default=OnlineParams(), description="options of online curvature")

    fishleg: RefinedFishLegParams = Field(
        default=RefinedFishLegParams(), description="options of the method fishleg"
    )
    epochs: int = Field(default=1, ge=0, description="epochs of training after each step")
    batch_size: int = Field(default=128, ge=1, description="samples in an optimiser step")

    @model_validator(mode="after")
    def _online(self) -> GradualParams:
        """Check that batches can update an online estimate.

        Raises:
            ValueError: they cannot.
        """
        if self.curvature == "steps":
            reset(self, "online")
            return self
        if self.selection == "admm":
            raise ValueError(
                "curvature: online expects selection: single or greedy, got 'admm', which takes an "
                "estimate of the full Fisher and not of survivors"
            )
        if self.method in ESTIMATOR_OPTIONS and self.method not in BATCHWISE:
            raise ValueError(
                f"curvature: online expects a method that batches can update, "
                f"{' or '.join(sorted(BATCHWISE))}, got {self.method!r}"
            )
        if not self.epochs:
            raise ValueError("curvature: online expects at least 1 of `epochs`, got 0")
        reset(self, "carry")  # what is carried is the estimate that training updates
        return self


class RefinementParams(OptionParams, RefinementOptions):
    """Options of the short runs that move survivors towards the dense model's outputs."""

    method: ClassVar[RefinementMethod] = RefinementOptions.method  # `refine` of the stage
    learning_rate: ClassVar[float | None] = RefinementOptions.learning_rate  # `lr` here
    bfloat16: ClassVar[bool] = RefinementOptions.bfloat16  # `precision` here
    samples: int = Field(
        default=5000, ge=1, description="calibration samples, the curvature's among them; no labels"
    )
    held_out: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="fraction of these that refinement does not see, and that decides its kept "
        "part: all, three quarters, ..., or nothing; 0: all",
    )
    steps: NonNegativeInt | list[NonNegativeInt] = Field(
        default=100,
        description="optimiser steps after each pruning step: one number, or one for each",
    )
    batch_size: int = Field(default=128, ge=1, description="samples in a step")
    lr: float | None = Field(
        default=None, gt=0, description="peak learning rate; null for the method's own"
    )
    augment: bool = Field(default=True, description="the data set's own random crops and flips")
    cutmix: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="fraction of images with a rectangle from another; against over-fitting to few "
        "samples, where the steps are many (from some 400)",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="number type of both passes"
    )


class MultistepParams(StepwiseParams):
    """Parameters of `prune_multistep`."""

    schedule: Schedule = Field(
        default="geometric",
        description="fast at first and slow at the end; equal steps; or equal fractions of the "
        "remaining weights",
    )
    carry: Literal["refine", "reestimate"] = Field(
        default="reestimate",
        description="between steps: start the estimate again, on the full Fisher with all zeros as "
        "constraints, or refine it with the new weights and masks",
    )
    refine: Literal["none", RefinementMethod] = Field(
        default="adam",
        description="method that lowers KL(dense || pruned) on the calibration samples after each "
        "step, or none",
    )
    refinement: RefinementParams = Field(
        default=RefinementParams(), description="options of the refinement"
    )

    @model_validator(mode="after")
    def _one_number_for_each_step(self) -> MultistepParams:
        given, steps = self.refinement.steps, len(self.stops) + 1 if self.stops else self.steps
        if isinstance(given, list) and len(given) != steps:
            raise ValueError(
                f"refinement.steps: expected a number for each of {steps} pruning steps, got "
                f"{len(given)}"
            )
        return self

    def refinement_steps(self, step: int) -> int:
        """Return the optimiser steps after pruning step number `step`, from 0."""
        given = self.refinement.steps
        if self.refine == "none":
            return 0
        return given[step] if isinstance(given, list) else given

    @model_validator(mode="after")
    def _forget_refinement(self) -> MultistepParams:
        if self.refine == "none":
            reset(self, "refinement")
        return self


class PickParams(TargetParams):
    """Parameters of `pick`, among the steps of a pruning."""
