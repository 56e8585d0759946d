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
        selection: by the cost of each weight alone ("single"), or after the others of its row that
            cost less ("greedy"); with any estimate.
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
