"""Stage `prune_gradual`: removes weights in steps, with training and fresh curvature between."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.stage import Context
from stages.determinism import compute_deterministically
from stages.lineage import Step
from stages.pruning import finish
from stages.stepwise import StepwisePruning
from stages.tensor_files import load_into, load_tensors, save_tensors
from stages.training import Training

if TYPE_CHECKING:
    from stages.catalogue import GradualParams


def prune_gradual(ctx: Context) -> None:
    """Prune input `model` along the schedule, and write output `model`.

    Each step brings the curvature up to date, removes weights, and trains what is left. A
    checkpoint stands within the fit of a step, or within its training, whose weights are removed
    already.
    """
    params: GradualParams = ctx.params
    compute_deterministically(ctx.device)
    run = StepwisePruning(ctx)
    unfinished = ctx.last_checkpoint()
    first = 0 if unfinished is None else run.load(unfinished)
    if unfinished is not None and run.fitting:
        network = load_tensors(unfinished / "network.safetensors", ctx.device)
        load_into(run.model.network, network)
    for step in range(first, len(run.sparsities)):
        resumed = unfinished if step == first and not run.fitting else None
        if resumed is None:
            run.update_curvature(step, partial(_checkpoint_fit, ctx, run, step))
            run.prune(step)
        _train(ctx, run, step, resumed)
    mode = "gradual" if params.epochs else "multistep"
    facts = run.recipe.facts(mode=mode, target=params.sparsity)
    done = Step.of("prune_gradual", params, warnings=run.warnings)
    finish(ctx, run.model.after(done, **facts), run.dataset)


def _checkpoint_fit(ctx: Context, run: StepwisePruning, step: int) -> None:
    with ctx.checkpoint() as folder:
        run.save(folder, step, fitting=True)
        save_tensors(folder / "network.safetensors", run.model.network.state_dict())


def _train(ctx: Context, run: StepwisePruning, step: int, resumed: Path | None) -> None:
    """Train the survivors for the step's epochs, from the start or from a checkpoint."""
    params: GradualParams = ctx.params
    training = Training(
        run.model.network, run.dataset, params, masks=run.model.masks, purpose=f"step {step}"
    )

    def save(folder: Path) -> None:
        run.save(folder, step)

    if resumed is not None:
        training.load(resumed)
    elif ctx.checkpoint_due():
        with ctx.checkpoint() as folder:
            training.save(folder)
            save(folder)
    training.run(ctx, first_step=step * params.epochs, also_save=save)
