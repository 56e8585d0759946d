"""Options of a pruning step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fishleg.options.choices import Compensation, Distribution, Selection
from fishleg.options.fields import Options, Range


@dataclass(frozen=True, kw_only=True)
class PruningOptions(Options):
    """Options of the choice of weights and of the moves of survivors.

    Attributes:
        selection: by the cost of each weight alone ("single"), after the others of its row that
            cost less ("greedy"), or all together by ADMM in the quadratic model ("admm"); with any
            estimate, "admm" only of the full Fisher.
        distribution: least salient of the whole network ("global"), or of each layer ("uniform");
            None is the method's own: uniform for the layer Hessian, global for all others.
        compensation: of survivors: none; sum of single-weight updates ("independent"); exact within
            each block ("joint"); across the network by Fisher products ("fisher").
        min_kept: least fraction of each layer's weights that survives, so that no layer is emptied;
            others are removed instead.
        cg_iterations: of conjugate gradients, at most, in one compensation.
    """

    selection: Selection = "single"
    distribution: Distribution | None = None
    compensation: Compensation = "joint"
    min_kept: Annotated[float, Range(ge=0, le=1)] = 0.0
    cg_iterations: Annotated[int, Range(ge=1)] = 500


@dataclass(frozen=True, kw_only=True)
class AdmmOptions(Options):
    """Options of the selection `admm`.

    Attributes:
        iterations: at most; they end once the mask no longer changes.
        penalty: of a layer at first, in units of 1 / mean(diag Q): low, the values adapt before the
            mask settles.
        growth: factor of the penalty from one iteration to the next.
        check_every: iterations from one measurement of a mask's cost to the next, and without a
            change of the mask after which it has settled.
    """

    iterations: Annotated[int, Range(ge=1)] = 200
    penalty: Annotated[float, Range(gt=0)] = 0.3
    growth: Annotated[float, Range(ge=1)] = 1.05
    check_every: Annotated[int, Range(ge=1, unit="iterations")] = 10
