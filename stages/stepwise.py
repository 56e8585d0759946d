"""A model on its way through pruning steps, with the curvature estimate that goes along."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fishleg.estimators.base import FitProgress
from fishleg.pruning import cubic, geometric, group_masks, linear
from pipeline.stage import Context, StageError, write_json
from stages.data.source import load_data
from stages.estimate import Recipe, load_state, save_state, user_errors
from stages.metrics import measure
from stages.model_folder import Model, input_model
from stages.pruning import begin, prune
from stages.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from stages.catalogue import StepwiseParams

_SCHEDULES = {"cubic": cubic, "linear": linear, "geometric": geometric}


class StepwisePruning:
    """Takes a model through the schedule; what happens between the steps is the stage's.

    Attributes:
        model: input `model`, as far as it is pruned.
        dataset: the model's.
        partition: the model's groups.
        recipe: how estimators are made.
        source: gradients on the calibration samples, at the model's present weights.
        estimator: the present estimate.
        sparsities: after each step.
        warnings: what there was to say about the steps so far, a sentence each.
        fitting: whether the checkpoint that was loaded stands in a fit, until that goes on.
    """

    def __init__(self, ctx: Context):
        self.ctx = ctx
        self.params: StepwiseParams = ctx.params
        self.model: Model = input_model(ctx, "model")
        self.dataset, _ = load_data(self.model.facts.data)
        self.partition = self.model.facts.partition(self.model.network)
        self.recipe = Recipe.from_params(self.params)
        self.source = self.recipe.calibration.gradients(self.model, self.partition, self.dataset)
        self.estimator = self.recipe.build(self.partition)
        self.sparsities = _schedule(self.params, self.model.facts.target)
        self.warnings: list[str] = []
        self.fitting = False
        begin(ctx, self.partition, self.params.sparsity)

    def warn(self, step: int, text: str) -> None:
        """Say something about a step, and keep it with the model."""
        self.ctx.say(f"step {step + 1}: {text}")
        self.warnings.append(f"Step {step + 1}: {text}")

    def update_curvature(self, step: int, checkpoint: Callable[[], None] | None = None) -> None:
        """Fit the estimate in the first step; then refine it, or fit a new one.

        Args:
            step: of the schedule, from 0.
            checkpoint: called within the fit when a checkpoint is due, to write one with `save`.
        """

        def report(progress: FitProgress) -> None:
            self.ctx.progress(progress.done, progress.total, f"fit step, pruning step {step + 1}")
            if checkpoint is not None and self.ctx.checkpoint_due():
                checkpoint()

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
            params=self.params,
            sparsity=self.sparsities[step],
            step=step + 1,
        )
        self.warnings += [f"Step {step + 1}: {text}" for text in warnings]
        found = measure(self.model.network, self.dataset, self.dataset.validation)
        self.ctx.log({"pruned/validation_accuracy": found["accuracy"]}, step=step + 1)

    def save(self, folder: Path, step: int, *, fitting: bool = False) -> None:
        """Add to a checkpoint: the step, masks, the estimate.

        Args:
            folder: of the checkpoint.
            step: of the schedule, from 0; its weights are removed already, unless it is `fitting`.
            fitting: whether the step's estimate is still being fitted.

        The network is the caller's to save.
        """
        write_json(folder / "step.json", {"step": step, "fitting": fitting})
        write_json(folder / "warnings.json", self.warnings)
        save_tensors(folder / "masks.safetensors", self.model.masks)
        if fitting or self.params.carry == "refine":
            save_state(folder, self.estimator)

    def load(self, folder: Path) -> int:
        """Restore what `save` wrote, and return the number of its step."""
        facts = json.loads((folder / "step.json").read_text("utf-8"))
        device = self.ctx.device
        masks = load_tensors(folder / "masks.safetensors", device)
        self.model = replace(self.model, masks=masks)
        self.fitting = facts["fitting"]
        self.warnings = json.loads((folder / "warnings.json").read_text("utf-8"))
        if self.fitting or self.params.carry == "refine":
            load_state(folder, self.estimator, device)
        return facts["step"]


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
            "(initial_sparsity, or the model's own); removed weights do not come back."
        )
    if params.stops:
        return [*params.stops, params.sparsity]
    return _SCHEDULES[params.schedule](begin, params.sparsity, params.steps)
