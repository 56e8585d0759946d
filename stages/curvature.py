"""Stage `curvature`: estimates the inverse Fisher of a model, and certifies it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fishleg.certificate import certify
from fishleg.estimators.base import FitProgress
from pipeline.stage import Context
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.distributed import joined
from stages.estimate import Recipe, load_state, save_state, share_state, user_errors
from stages.lineage import Step
from stages.model_folder import input_model

if TYPE_CHECKING:
    from stages.catalogue import CurvatureParams


def curvature(ctx: Context) -> None:
    """Fit, going on from the last checkpoint if there is one, and write output `curvature`."""
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
    unfinished = ctx.last_checkpoint()
    if unfinished is not None:
        load_state(unfinished, estimator, ctx.device)
        ctx.say("going on from an unfinished fit")

    def report(progress: FitProgress) -> None:
        ctx.progress(progress.done, progress.total, "fit step")
        if progress.metrics:
            ctx.log({f"fit/{k}": v for k, v in progress.metrics.items()}, step=progress.done)
        if ctx.rank == 0 and ctx.checkpoint_due():
            with ctx.checkpoint() as folder:
                save_state(folder, estimator)

    with joined(ctx) as source.rank_group, user_errors():
        resume = source.rank_group.any(unfinished is not None)
        if resume:
            share_state(source.rank_group, estimator, ctx.device)
        estimator.fit(source, report, resume=resume)
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
    save_state(
        ctx.output("curvature"),
        estimator,
        recipe=recipe.to_json(),
        step=Step.of("curvature", params).to_json(),
        model_key=ctx.input("model").key,
        certificate=certificate,
    )
