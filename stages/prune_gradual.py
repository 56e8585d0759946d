"""Stage `prune_gradual`: removes weights in steps, with training and fresh curvature between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fishleg.calibration import Calibration
from fishleg.fresh import step_seed
from fishleg.gradients.rank_group import ALONE, RankGroup
from fishleg.pruning import group_masks
from pipeline.stage import Context
from stages.determinism import compute_deterministically
from stages.distributed import joined
from stages.estimate import user_errors
from stages.pruning import finish, made_by
from stages.stepwise import StepwisePruning
from stages.training import Training

if TYPE_CHECKING:
    from stages.catalogue import GradualParams


def prune_gradual(ctx: Context) -> None:
    """Prune input `model` along the schedule, and write output `model`.

    Each step updates the curvature, removes weights, and trains the survivors. With online
    curvature the first step fits the estimate, and the training between steps updates it. A
    checkpoint is taken within the fit of a step, or within its training, after its weights are
    removed.
    """
    params: GradualParams = ctx.params
    compute_deterministically(ctx.device)
    with joined(ctx) as rank_group:
        run = GradualPruning(ctx, rank_group)
        for step in range(run.resume(), len(run.sparsities)):
            if not run.unfinished:
                run.update_curvature(step)
                run.prune(step)
            run.train(step)
    if ctx.rank > 0:
        return
    mode = "gradual" if params.epochs else "multistep"
    facts = run.recipe.facts(mode=mode, target=params.sparsity)
    done = made_by("prune_gradual", params, run.estimator, run.warnings)
    finish(ctx, run.model.after(done, **facts), run.dataset)


class GradualPruning(StepwisePruning):
    """Adds the training between the steps, on which the curvature may ride."""

    def __init__(self, ctx: Context, rank_group: RankGroup = ALONE):
        super().__init__(ctx, rank_group)
        self.params: GradualParams = ctx.params

    @property
    def is_online(self) -> bool:
        """Whether training updates the curvature."""
        return self.params.curvature == "online"

    def update_curvature(self, step: int) -> None:
        """Make the estimate of a step; online, all but the first are made of training batches."""
        if self.is_online and step > 0 and not self.fitting:
            with user_errors():
                self.estimator.settle(self.source)
        else:
            super().update_curvature(step)

    def train(self, step: int) -> None:
        """Train the survivors for the step's epochs, from the start or from a checkpoint."""
        training = Training(
            self.model.network,
            self.dataset,
            self.params,
            masks=self.model.masks,
            purpose=f"step {step}",
            rank_group=self.rank_group,
        )

        def checkpoint() -> None:
            self.checkpoint(step, training=training.state_dict())

        if self.unfinished:
            training.load_state_dict(self.unfinished.pop("training"))
        elif self.ctx.rank == 0 and self.ctx.checkpoint_due():
            checkpoint()
        masks = group_masks(self.partition, self.model.masks)

        def ride(inputs: Tensor, number: int) -> None:
            if number % self.params.online.every == 0:
                self._learn(inputs, masks, step * self.params.epochs * training.batches + number)

        # after the last step nothing is pruned any more
        rides = self.is_online and step + 1 < len(self.sparsities)
        training.run(
            self.ctx,
            first_step=step * self.params.epochs,
            checkpoint=checkpoint,
            after_step=ride if rides else None,
        )

    def _learn(self, inputs: Tensor, masks: dict[str, Tensor], number: int) -> None:
        """Update the curvature by a part of training batch `number`, its labels drawn afresh."""
        some = Calibration(inputs=inputs[: self.params.online.samples])
        with user_errors():
            batch = self.source.over(some, seed=step_seed(self.params.seed, number))
            self.estimator.learn(batch, masks)
