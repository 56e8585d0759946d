"""Stage `select`: selects the candidate that is best on the validation split."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from pipeline.stage import Context, StageError
from stages.data.batches import augmented
from stages.data.source import load_data
from stages.determinism import compute_deterministically, generator
from stages.grids import warnings_of_ends
from stages.lineage import Step, choices, differences
from stages.metrics import classify, measure
from stages.model_folder import add_step, input_model, load_facts, load_model

if TYPE_CHECKING:
    from stages.catalogue import SelectParams

_AT_ONCE = 500  # images


def select(ctx: Context) -> None:
    """Measure all candidates, log their scores, and copy the best to output `model`.

    Of equal candidates one inside the grids of its settings wins over one at an end, then the
    earlier one. A chosen value that is an end of its grid is a warning, which the model keeps.
    Candidates whose cells failed are skipped.

    Raises:
        StageError: all of them failed.
    """
    params: SelectParams = ctx.params
    compute_deterministically(ctx.device)
    folders = {one.cell: one.path for one in ctx.inputs["candidates"] if one.path is not None}
    if not folders:
        raise StageError("select: every candidate failed; correct a cell upstream.")
    divergence = _divergence(ctx) if params.metric == "divergence" else None
    scores: dict[str, dict[str, float]] = {}
    for cell, folder in folders.items():
        model = load_model(folder, ctx.device)
        dataset, _ = load_data(model.facts.data)
        if divergence is None:
            scores[cell] = measure(model.network, dataset, dataset.validation)
        else:
            scores[cell] = {"divergence": divergence(model.network)}
        ctx.say(f"{cell}: validation {params.metric} {scores[cell][params.metric]:.3f}")
        ctx.progress(len(scores), len(folders), "model")
    sign = 1 if params.metric == "accuracy" else -1
    lineages = {cell: load_facts(folder).lineage for cell, folder in folders.items()}
    among = Step.of("select", params, among=differences(list(lineages.values())))
    ends = {cell: warnings_of_ends(choices([*one, among])) for cell, one in lineages.items()}
    best = min(scores, key=lambda cell: (-sign * scores[cell][params.metric], len(ends[cell])))
    _pass_on(ctx, best, folders[best], replace(among, warnings=tuple(ends[best])))
    ctx.log({f"validation/{name}": value for name, value in scores[best].items()})
    ctx.say(f"chosen: {best}")
    for warning in ends[best]:
        ctx.say(f"{best}: {warning}")


def _divergence(ctx: Context) -> Callable[[nn.Module], float]:
    """Return network -> mean KL(dense || network) on augmented validation images, in nats.

    The images are the same for all seeds of a stage.

    Raises:
        StageError: there is no input `dense`.
    """
    if "dense" not in ctx.inputs:
        raise StageError(
            "select: the metric 'divergence' is from a dense model; add the input `dense`, or take "
            "the metric accuracy or nll."
        )
    dense = input_model(ctx, "dense")
    dataset, _ = load_data(dense.facts.data)
    images = augmented(dataset, dataset.validation.inputs, generator(0, "divergence"))
    seen = replace(dataset.validation, inputs=images)
    wanted = classify(dense.network, dataset, seen, _AT_ONCE).double().log_softmax(-1)

    def divergence(network: nn.Module) -> float:
        found = classify(network, dataset, seen, _AT_ONCE).double().log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    return divergence


def _pass_on(ctx: Context, cell: str, chosen: Path, step: Step) -> None:
    """Copy the chosen model's folder, and add the choice to its facts."""
    folder = ctx.output("model")
    shutil.copytree(chosen, folder, dirs_exist_ok=True)
    add_step(folder, step, selected=cell)
