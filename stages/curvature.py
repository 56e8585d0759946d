"""Stage `curvature`: estimates the inverse Fisher of a model, and certifies it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fishleg import GradientSource
from fishleg.certificate import certify
from fishleg.estimators.base import AbstractEstimator, FitProgress
from pipeline.stage import Context
from stages.checkpoint import Checkpoint, share
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.distributed import joined
from stages.estimate import Recipe, StoredEstimate, save_estimate, user_errors
from stages.lineage import Step
from stages.model_folder import input_model

if TYPE_CHECKING:
    from stages.catalogue import CurvatureParams


def curvature(ctx: Context) -> None:
    """Fit, from the last checkpoint if there is one, and write output `curvature`."""
    params: CurvatureParams = ctx.params
    compute_deterministically(ctx.device)
    model = input_model(ctx, "model")
    dataset, _ = load_data(model.facts.data)
    partition = model.facts.partition(model.network)
    recipe = Recipe.from_params(params)
    estimator = recipe.build(partition)
    source = recipe.calibration.gradients(model, partition, dataset)
    if source.rows < params.samples:
        ctx.say(f"fewer training samples than the {params.samples} asked for: all are used")
    for parameter, path in source.report():
        ctx.say(f"{parameter}: {path}")
    _fit(ctx, estimator, source)
    if ctx.rank > 0:
        return
    for warning in estimator.warnings:
        ctx.say(warning)
    ctx.log({"memory_bytes": estimator.memory_bytes()})
    certificate = None
    held_out = recipe.calibration.held_out(dataset, params.certificate_samples)
    if len(held_out):
        unseen = recipe.calibration.gradients(model, partition, dataset, held_out)
        certificate = certify(estimator, unseen, seed=params.seed)
        ctx.log({f"certificate/{name}": value for name, value in certificate["network"].items()})
    made = StoredEstimate(
        estimator=estimator,
        recipe=recipe,
        step=Step.of("curvature", params),
        model_key=ctx.input("model").key,
    )
    save_estimate(ctx.output("curvature"), made, certificate)


def _fit(ctx: Context, estimator: AbstractEstimator, source: GradientSource) -> None:
    """Fit in all ranks, from the first rank's last checkpoint if there is one."""
    last = Checkpoint.last(ctx)
    if last is not None:
        estimator.load_state_dict(last.state("estimator", ctx.device))
        ctx.say("resuming an unfinished fit")

    def report(progress: FitProgress) -> None:
        ctx.progress(progress.done, progress.total, "fit step")
        if progress.metrics:
            ctx.log({f"fit/{k}": v for k, v in progress.metrics.items()}, step=progress.done)
        if ctx.rank == 0 and ctx.checkpoint_due():
            Checkpoint(states={"estimator": estimator.state_dict()}).write(ctx)

    with joined(ctx) as source.rank_group, user_errors():
        resume = source.rank_group.any(last is not None)
        if resume:
            estimator.load_state_dict(share(source.rank_group, estimator.state_dict(), ctx.device))
        estimator.fit(source, report, resume=resume)
