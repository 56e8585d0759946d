"""Stage `pick`: selects one step of a multi-step pruning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.stage import Context, StageError
from stages.columns import target_of
from stages.lineage import Step
from stages.model_folder import add_step

if TYPE_CHECKING:
    from stages.catalogue import PickParams


def pick(ctx: Context) -> None:
    """Copy the step at a sparsity, or the sparsest step in the budget, to output `model`."""
    params: PickParams = ctx.params
    folder = cast(Path, ctx.input("steps").path)
    facts = json.loads((folder / "steps.json").read_text("utf-8"))
    steps: list[dict[str, float]] = facts["steps"]
    if params.sparsity is not None:
        number = _of_sparsity(steps, params.sparsity)
    else:
        number = _within(steps, facts["dense"]["validation_accuracy"], cast(float, params.within))
    model = ctx.output("model")
    shutil.copytree(folder / f"{number + 1:03d}", model, dirs_exist_ok=True)
    note: dict[str, Any] = {**steps[number], "step": number + 1}
    add_step(model, Step.of("pick", params), picked=note)
    ctx.log(note)


def _of_sparsity(steps: Sequence[dict[str, float]], sparsity: float) -> int:
    """Return the number of the step at `sparsity`.

    Raises:
        StageError: there is none.
    """
    for number, step in enumerate(steps):
        if target_of(step) == sparsity:
            return number
    known = ", ".join(f"{target_of(step):g}" for step in steps)
    raise StageError(
        f"pick: no step has sparsity {sparsity:g}; the steps have {known}. Add it to `stops` of "
        "the multi-step pruning."
    )


def _within(steps: Sequence[dict[str, float]], dense: float, points: float) -> int:
    """Return the number of the sparsest step at most `points` below dense.

    Raises:
        StageError: there is none.
    """
    good = [
        number for number, step in enumerate(steps) if step["validation_accuracy"] >= dense - points
    ]
    if not good:
        raise StageError(
            f"pick: no step is within {points:g} points of the dense model's {dense:.2f} % on the "
            f"validation split; the first, at sparsity {target_of(steps[0]):g}, has "
            f"{steps[0]['validation_accuracy']:.2f} %. Begin with a lower sparsity."
        )
    return good[-1]
