"""Stage `finetune`: trains the surviving weights of a pruned model, against a teacher if given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from pipeline.stage import Context
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.distributed import joined
from stages.lineage import Step, teacher_of
from stages.metrics import log_validation
from stages.model_folder import Model, input_model, load_facts, save_model
from stages.training import Teacher, Training

if TYPE_CHECKING:
    from stages.catalogue import FinetuneParams


def finetune(ctx: Context) -> None:
    """Train with masks kept, from the last checkpoint if any, and write output `model`."""
    params: FinetuneParams = ctx.params
    compute_deterministically(ctx.device)
    model = input_model(ctx, "model")
    dataset, _ = load_data(model.facts.data)
    teacher = _teacher(ctx, params)
    with joined(ctx) as rank_group:
        training = Training(
            model.network,
            dataset,
            params,
            masks=model.masks,
            teacher=teacher,
            rank_group=rank_group,
        )
        training.resume(ctx)
        training.run(ctx)
    if ctx.rank == 0:
        save_model(ctx.output("model"), model.after(_step(ctx, model), finetuned=True))
        log_validation(ctx, model.network, dataset)


def _step(ctx: Context, model: Model) -> Step:
    """Return the step in the lineage, with the teacher's origin."""
    if not ctx.inputs.get("teacher"):
        return Step.of("finetune", ctx.params)
    lineage = load_facts(cast(Path, ctx.input("teacher").path)).lineage
    return Step.of(
        "finetune", ctx.params, further={"teacher": teacher_of(model.facts.lineage, lineage)}
    )


def _teacher(ctx: Context, params: FinetuneParams) -> Teacher | None:
    if not ctx.inputs.get("teacher"):
        return None
    return Teacher(
        network=input_model(ctx, "teacher").network,
        weight=params.distillation,
        temperature=params.temperature,
    )
