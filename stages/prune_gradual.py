"""Stage `prune_gradual`: removes weights in steps, with training and fresh curvature between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.stage import Context
from stages.determinism import compute_deterministically
from stages.pruning import finish, made_by
from stages.stepwise import StepwisePruning
from stages.training import Training

if TYPE_CHECKING:
    from stages.catalogue import GradualParams


def prune_gradual(ctx: Context) -> None:
    """Prune input `model` along the schedule, and write output `model`.

    Each step updates the curvature, removes weights, and trains the survivors. A checkpoint is
    taken within the fit of a step, or within its training, after its weights are removed.
    """
    params: GradualParams = ctx.params
    compute_deterministically(ctx.device)
    run = StepwisePruning(ctx)
    for step in range(run.resume(), len(run.sparsities)):
        if not run.unfinished:
            run.update_curvature(step)
            run.prune(step)
        _train(ctx, run, step)
    mode = "gradual" if params.epochs else "multistep"
    facts = run.recipe.facts(mode=mode, target=params.sparsity)
    done = made_by("prune_gradual", params, run.estimator, run.warnings)
    finish(ctx, run.model.after(done, **facts), run.dataset)


def _train(ctx: Context, run: StepwisePruning, step: int) -> None:
    """Train the survivors for the step's epochs, from the start or from a checkpoint."""
    params: GradualParams = ctx.params
    training = Training(
        run.model.network, run.dataset, params, masks=run.model.masks, purpose=f"step {step}"
    )

    def checkpoint() -> None:
        run.checkpoint(step, training=training.state_dict())

    if run.unfinished:
        training.load_state_dict(run.unfinished.pop("training"))
    elif ctx.checkpoint_due():
        checkpoint()
    training.run(ctx, first_step=step * params.epochs, checkpoint=checkpoint)
