"""Stage `pretrain`: trains a network from fresh weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.stage import Context
from stages.data.source import DataSource, load_data
from stages.determinism import compute_deterministically, derive_seed
from stages.distributed import joined
from stages.metrics import log_validation, require_classifier
from stages.model_folder import Facts, Model, save_model
from stages.training import Training

if TYPE_CHECKING:
    from stages.catalogue import PretrainParams


def pretrain(ctx: Context) -> None:
    """Train, from the last checkpoint if there is one, and write output `model`."""
    params: PretrainParams = ctx.params
    compute_deterministically(ctx.device)
    dataset, source = load_data(DataSource.from_params(params))
    for note in dataset.notes:
        ctx.say(note)
    facts = Facts.from_params("pretrain", params, dataset, source)
    torch.manual_seed(derive_seed(params.seed, "weights"))
    network = facts.build().to(ctx.device)
    require_classifier(network, dataset)
    facts.partition(network)  # so a pattern that matches nothing is an error now
    with joined(ctx) as rank_group:
        training = Training(network, dataset, params, rank_group=rank_group)
        training.resume(ctx)
        training.run(ctx)
    if ctx.rank == 0:
        found = log_validation(ctx, network, dataset)
        model = Model(network=network, masks={}, facts=facts)
        dense = {"validation": found["accuracy"]}
        save_model(ctx.output("model"), model.with_facts(dense_accuracy=dense))
