"""Stage `select`: selects the candidate that is best on the validation split."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.stage import Context, StageError
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.lineage import Step, differences
from stages.metrics import measure
from stages.model_folder import add_step, load_facts, load_model

if TYPE_CHECKING:
    from stages.catalogue import SelectParams


def select(ctx: Context) -> None:
    """Measure all candidates, log their scores, and copy the best to output `model`.

    The earlier of two equal candidates wins. Candidates whose cells failed are skipped.

    Raises:
        StageError: all of them failed.
    """
    params: SelectParams = ctx.params
    compute_deterministically(ctx.device)
    folders = {one.cell: one.path for one in ctx.inputs["candidates"] if one.path is not None}
    if not folders:
        raise StageError("select: every candidate failed; correct a cell upstream.")
    scores: dict[str, dict[str, float]] = {}
    for cell, folder in folders.items():
        model = load_model(folder, ctx.device)
        dataset, _ = load_data(model.facts.data)
        scores[cell] = measure(model.network, dataset, dataset.validation)
        ctx.say(f"{cell}: validation {params.metric} {scores[cell][params.metric]:.3f}")
        ctx.progress(len(scores), len(folders), "model")
    sign = 1 if params.metric == "accuracy" else -1
    best = max(scores, key=lambda cell: sign * scores[cell][params.metric])
    _pass_on(ctx, best, folders)
    ctx.log({f"validation/{name}": value for name, value in scores[best].items()})
    ctx.say(f"chosen: {best}")


def _pass_on(ctx: Context, cell: str, folders: Mapping[str, Path]) -> None:
    """Copy the chosen model's folder, and note the differences of the candidates in its facts."""
    folder = ctx.output("model")
    shutil.copytree(folders[cell], folder, dirs_exist_ok=True)
    among = differences([load_facts(one).lineage for one in folders.values()])
    add_step(folder, Step.of("select", ctx.params, among=among), selected=cell)
