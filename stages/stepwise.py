"""A model on its way through pruning steps, with its curvature estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fishleg.estimators.base import FitProgress
from fishleg.gradients.rank_group import ALONE, RankGroup
from fishleg.pruning import cubic, geometric, group_masks, linear
from pipeline.stage import Context, StageError
from stages.checkpoint import Checkpoint, State
from stages.data.source import load_data
from stages.distributed import require_equal
from stages.estimate import Recipe, user_errors
from stages.metrics import measure
from stages.model_folder import Model, input_model
from stages.pruning import begin, prune
from stages.tensor_files import load_into

if TYPE_CHECKING:
    from stages.catalogue import StepwiseParams

_SCHEDULES = {"cubic": cubic, "linear": linear, "geometric": geometric}


class StepwisePruning:
    """Takes a model through the schedule; the stage trains or refines it between the steps.

    Attributes:
        model: input `model` in its present state.
        dataset: the model's.
        partition: the model's groups.
        recipe: how estimators are made.
        source: gradients on the calibration samples, at the model's present weights.
        estimator: the present estimate.
        sparsities: after each step.
        warnings: about the steps so far, a sentence each.
        fitting: whether the checkpoint was taken within a fit; False once that is resumed.
        unfinished: name -> state of the training or refinement that the checkpoint was taken in;
            empty once that is resumed.
        folders: name -> folder that belongs to each checkpoint.
        rank_group: the processes that do this together. All prune alike; the first one writes.
    """

    def __init__(self, ctx: Context, rank_group: RankGroup = ALONE):
        self.ctx = ctx
        self.rank_group = rank_group
        self.params: StepwiseParams = ctx.params
        self.model: Model = input_model(ctx, "model")
        self.dataset, _ = load_data(self.model.facts.data)
        self.partition = self.model.facts.partition(self.model.network)
        self.recipe = Recipe.from_params(self.params)
        self.source = self.recipe.calibration.gradients(self.model, self.partition, self.dataset)
        self.source.rank_group = rank_group
        self.estimator = self.recipe.build(self.partition)
        self.sparsities = _schedule(self.params, self.model.facts.target)
        self.warnings: list[str] = []
        self.fitting = False
        self.unfinished: dict[str, State] = {}
        self.folders: dict[str, Path] = {}
        begin(ctx, self.partition, self.params.sparsity)

    def warn(self, step: int, text: str) -> None:
        """Log a warning about a step, and keep it with the model."""
        self.ctx.say(f"step {step + 1}: {text}")
        self.warnings.append(f"Step {step + 1}: {text}")

    def update_curvature(self, step: int) -> None:
        """Fit the estimate in the first step; then refine it, or fit a new one.

        Args:
            step: of the schedule, from 0.
        """

        def report(progress: FitProgress) -> None:
            self.ctx.progress(progress.done, progress.total, f"fit step, pruning step {step + 1}")
            if self.ctx.checkpoint_due():
                self.checkpoint(step, fitting=True)

        with user_errors():
            if self.fitting:
                self.fitting = False
                self.estimator.fit(self.source, report, resume=True)
            elif step == 0 or self.params.carry == "reestimate":
                self.estimator = self.recipe.build(self.partition)
                self.estimator.fit(self.source, report)
            else:
                masks = group_masks(self.partition, self.model.masks)
                self.estimator.refine(self.source, masks, report)

    def prune(self, step: int) -> None:
        """Remove weights up to the step's sparsity, and move the others."""
        self.model, warnings = prune(
            self.ctx,
            self.model,
            self.estimator,
            self.source,
            self.dataset,
            params=self.params,
            sparsity=self.sparsities[step],
            step=step + 1,
        )
        require_equal(self.rank_group, {**self.model.network.state_dict(), **self.model.masks})
        self.warnings += [f"Step {step + 1}: {text}" for text in warnings]
        found = measure(self.model.network, self.dataset, self.dataset.validation)
        self.ctx.log({"pruned/validation_accuracy": found["accuracy"]}, step=step + 1)

    def checkpoint(self, step: int, *, fitting: bool = False, **unfinished: State) -> None:
        """Write a checkpoint.

        Args:
            step: of the schedule, from 0; its weights are removed already, unless it is `fitting`.
            fitting: whether the step's estimate is still being fitted.
            unfinished: the states of the training or refinement that is under way.
        """
        if self.ctx.rank > 0:
            return
        states: dict[str, State] = {
            "network": {"tensors": self.model.network.state_dict()},
            "masks": {"tensors": self.model.masks},
        }
        if fitting or self.params.carry == "refine":
            states["estimator"] = self.estimator.state_dict()
        Checkpoint(
            cursor={"step": step, "fitting": fitting, **self.past()},
            states={**states, **unfinished},
            folders=self.folders,
        ).write(self.ctx)

    def past(self) -> dict[str, Any]:
        """Return the facts about the steps so far that a checkpoint keeps, as JSON."""
        return {"warnings": self.warnings}

    def resume(self) -> int:
        """Restore the last checkpoint in all ranks; return the number of its step, or else 0."""
        last = Checkpoint.shared(self.ctx, self.rank_group)
        if last is None:
            return 0
        self.restore(last)
        return last.cursor["step"]

    def restore(self, last: Checkpoint) -> None:
        """Restore a checkpoint."""
        device, states = self.ctx.device, dict(last.states)
        load_into(self.model.network, states.pop("network")["tensors"])
        self.model = replace(self.model, masks=last.tensors("masks", device))
        if states.pop("estimator", None) is not None:
            self.estimator.load_state_dict(last.state("estimator", device))
        del states["masks"]
        self.fitting, self.warnings = last.cursor["fitting"], last.cursor["warnings"]
        self.unfinished = states


def _schedule(params: StepwiseParams, sparsity: float) -> Sequence[float]:
    """Return the sparsity after each step, for a model of `sparsity`.

    Raises:
        StageError: the model, or the schedule's beginning, is sparser than its end.
    """
    begin = max(params.initial_sparsity, sparsity)
    first = min([params.sparsity, *params.stops])
    if max(sparsity, begin if not params.stops else 0.0) > first:
        raise StageError(
            f"sparsity: {first:g} is below {begin:g}, where the schedule begins "
            "(initial_sparsity, or the model's own); removed weights stay removed."
        )
    if params.stops:
        return [*params.stops, params.sparsity]
    return _SCHEDULES[params.schedule](begin, params.sparsity, params.steps)
