"""Stage `prune_gradual`: removes weights in steps, with training and fresh curvature between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fishleg.estimators.base import FitProgress
from fishleg.pruning import cubic, group_masks, linear
from pipeline.stage import Context, StageError, write_json
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.estimate import Recipe, load_state, save_state, user_errors
from stages.metrics import log_validation, measure
from stages.model_folder import input_model, save_model
from stages.pruning import prune
from stages.tensor_files import load_tensors, save_tensors
from stages.training import Training

if TYPE_CHECKING:
    from stages.catalogue import GradualParams


def prune_gradual(ctx: Context) -> None:
    """Prune input `model` along the schedule, and write output `model`.

    Each step brings the curvature up to date, removes weights, and trains what is left. A
    checkpoint stands within the training of a step, whose weights are removed already.
    """
    params: GradualParams = ctx.params
    compute_deterministically(ctx.device)
    run = GradualPruning(ctx)
    unfinished = ctx.last_checkpoint()
    first = 0 if unfinished is None else run.load(unfinished)
    for step in range(first, params.steps):
        resumed = unfinished if step == first else None
        if resumed is None:
            run.update_curvature(step)
            run.prune(step)
        run.train(step, resumed)
    mode = "gradual" if params.epochs else "oneshot"
    facts = run.recipe.facts(mode=mode, sparsity=params.sparsity)
    save_model(ctx.output("model"), run.model.with_facts(**facts))
    log_validation(ctx, run.model.network, run.dataset)


class GradualPruning:
    """A model on its way through the schedule, with the curvature estimate that goes along."""

    def __init__(self, ctx: Context):
        self.ctx = ctx
        self.params: GradualParams = ctx.params
        self.model = input_model(ctx, "model")
        self.dataset, _ = load_data(self.model.facts.data)
        self.partition = self.model.facts.partition(self.model.network)
        self.recipe = Recipe.from_params(self.params)
        self.source = self.recipe.calibration.gradients(self.model, self.partition, self.dataset)
        self.estimator = self.recipe.build(self.partition)
        self.sparsities = self._schedule()

    def _schedule(self) -> list[float]:
        """Return the sparsity after each step.

        Raises:
            StageError: the model, or the schedule's beginning, is sparser than its end.
        """
        begin = max(self.params.initial_sparsity, self.model.facts.sparsity)
        if begin > self.params.sparsity:
            raise StageError(
                f"sparsity: {self.params.sparsity:g} is below {begin:g}, where the schedule begins "
                "(initial_sparsity, or the model's own); removed weights do not come back."
            )
        schedule = cubic if self.params.schedule == "cubic" else linear
        return schedule(begin, self.params.sparsity, self.params.steps)

    def update_curvature(self, step: int) -> None:
        """Fit the estimate in the first step; then refine it, or fit a new one."""

        def report(progress: FitProgress) -> None:
            self.ctx.progress(progress.done, progress.total, f"fit step, pruning step {step + 1}")

        with user_errors():
            if step == 0 or self.params.carry == "reestimate":
                self.estimator = self.recipe.build(self.partition)
                self.estimator.fit(self.source, report)
            else:
                masks = group_masks(self.partition, self.model.masks)
                self.estimator.refine(self.source, masks, report)

    def prune(self, step: int) -> None:
        """Remove weights up to the step's sparsity, and move the others."""
        self.model = prune(
            self.ctx,
            self.model,
            self.estimator,
            self.source,
            params=self.params,
            sparsity=self.sparsities[step],
            step=step + 1,
        )
        found = measure(self.model.network, self.dataset, self.dataset.validation)
        self.ctx.log({"pruned/validation_accuracy": found["accuracy"]}, step=step + 1)

    def train(self, step: int, resumed: Path | None) -> None:
        """Train the survivors for the step's epochs, from the start or from a checkpoint."""
        training = Training(
            self.model.network,
            self.dataset,
            self.params,
            masks=self.model.masks,
            purpose=f"step {step}",
        )

        def save(folder: Path) -> None:
            write_json(folder / "gradual.json", {"step": step})
            save_tensors(folder / "masks.safetensors", self.model.masks)
            if self.params.carry == "refine":
                save_state(folder, self.estimator)

        if resumed is not None:
            training.load(resumed)
        elif self.ctx.checkpoint_due():
            with self.ctx.checkpoint() as folder:
                training.save(folder)
                save(folder)
        training.run(self.ctx, first_step=step * self.params.epochs, also_save=save)

    def load(self, folder: Path) -> int:
        """Restore what `train` saved besides the training, and return the number of its step."""
        masks = load_tensors(folder / "masks.safetensors", self.ctx.device)
        self.model = replace(self.model, masks=masks)
        if self.params.carry == "refine":
            load_state(folder, self.estimator, self.ctx.device)
        return json.loads((folder / "gradual.json").read_text("utf-8"))["step"]
