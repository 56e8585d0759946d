"""Stage `prune_oneshot`: removes weights in one step, and moves the others."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fishleg.certificate import pruning_certificate
from pipeline.stage import Context, StageError
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.estimate import load_estimate
from stages.metrics import log_validation
from stages.model_folder import input_model, save_model
from stages.pruning import prune

if TYPE_CHECKING:
    from stages.catalogue import OneshotParams


def prune_oneshot(ctx: Context) -> None:
    """Prune input `model` by input `curvature`, and write output `model`.

    Raises:
        StageError: the curvature is another model's.
    """
    params: OneshotParams = ctx.params
    compute_deterministically(ctx.device)
    model = input_model(ctx, "model")
    dataset, _ = load_data(model.facts.data)
    partition = model.facts.partition(model.network)
    folder = cast(Path, ctx.input("curvature").path)
    estimator, recipe, model_key = load_estimate(folder, partition, ctx.device)
    if model_key != ctx.input("model").key:
        raise StageError(
            f"{ctx.input('curvature').cell} is the curvature of another model than "
            f"{ctx.input('model').cell}; connect both to the same one."
        )
    source = recipe.calibration.gradients(model, partition, dataset)
    before = copy.deepcopy(model.network)
    pruned = prune(ctx, model, estimator, source, params=params, sparsity=params.sparsity)
    facts = recipe.facts(mode="oneshot", sparsity=params.sparsity)
    save_model(ctx.output("model"), pruned.with_facts(**facts))
    chosen = recipe.calibration.indices(dataset)[: params.certificate_samples]
    if len(chosen):
        dense = replace(model, network=before)
        unpruned = recipe.calibration.gradients(dense, partition, dataset, chosen)
        found = pruning_certificate(unpruned, dict(pruned.network.named_parameters()))
        ctx.log({f"pruned/{name}": value for name, value in found.items()})
    log_validation(ctx, pruned.network, dataset)
