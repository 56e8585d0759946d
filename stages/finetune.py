"""Stage `finetune`: trains the surviving weights of a pruned model, against a teacher if given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.stage import Context
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.distributed import joined
from stages.metrics import log_validation
from stages.model_folder import input_model, save_model
from stages.training import Teacher, Training

if TYPE_CHECKING:
    from stages.catalogue import FinetuneParams


def finetune(ctx: Context) -> None:
    """Train with masks kept, going on from the last checkpoint, and write output `model`."""
    params: FinetuneParams = ctx.params
    compute_deterministically(ctx.device)
    model = input_model(ctx, "model")
    dataset, _ = load_data(model.facts.data)
    teacher = _teacher(ctx, params)
    with joined(ctx) as team:
        training = Training(
            model.network, dataset, params, masks=model.masks, teacher=teacher, team=team
        )
        training.resume(ctx)
        training.run(ctx)
    if ctx.rank == 0:
        save_model(ctx.output("model"), model.with_facts(finetuned=True))
        log_validation(ctx, model.network, dataset)


def _teacher(ctx: Context, params: FinetuneParams) -> Teacher | None:
    if not ctx.inputs.get("teacher"):
        return None
    return Teacher(
        network=input_model(ctx, "teacher").network,
        weight=params.distillation,
        temperature=params.temperature,
    )
