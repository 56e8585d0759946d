"""What can be chosen about a FishLeg fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fishleg.errors import UnknownName
from fishleg.solvers.adam import Objective
from fishleg.solvers.alternating import MaskFit
from fishleg.warmstart import Structure

SolverName = Literal["auto", "alternating", "adam"]
WarmStart = Literal["kfac", "moments", "diagonal", "identity"]

CLOSED_FORM = frozenset({"block", "diagonal", "full"})
_CHOICES = {
    "structure": Structure,
    "solver": SolverName,
    "objective": Objective,
    "warm_start": WarmStart,
    "mask_fit": MaskFit,
}


@dataclass(frozen=True, kw_only=True)
class FishLegOptions:
    """How FishLeg is to fit.

    Attributes:
        structure: of the blocks. Vectors (biases and normalisation) of up to 1,024 parameters get
            a dense block in place of factors; the tensor structure is for kernels larger than one
            position, other groups are Kronecker. `eigen` is a Kronecker eigenbasis with free
            eigenvalues: it holds the inverse of a damped Kronecker product, which is no Kronecker
            product itself.
        solver: `alternating` half-steps for Kronecker blocks without scale, and the closed form of
            the minimiser for eigen, block, diagonal and full; `adam` for any but eigen; `auto` is
            the former where there is one.
        objective: the form of J that Adam follows; `probe` is for Adam only.
        warm_start: inverse K-FAC factors (where no layer is known, as in `moments`); inverse second
            moments of the gradients' rows and columns; inverse diagonal Fisher; identity / gamma.
            Where a scale is to be fitted beside two factors, two alternating sweeps follow, except
            on the diagonal, which is in the scale already. To eigen it gives the
            basis (`kfac` or `moments`; a refinement takes the `moments` of masked gradients).
        shrinkage: of eigen's measured curvature towards the product of its factors, in [0, 1]; see
            `ClosedFormSolver`.
        sweeps: pairs of half-steps in a fit.
        refine_sweeps: pairs of half-steps in a refinement.
        mask_fit: what masked solvers minimise: J_M (`exact`), or J of the masked gradients.
        cg_iterations: at most, in an exact masked half-step.
        block_size: of the block structure.
        steps: of Adam in a fit.
        refine_steps: of Adam in a refinement.
        preconditioned_steps: how many of Adam's steps, the first ones, are preconditioned. None by
            default: from these warm starts plain steps were the better ones.
        learning_rate: of Adam, relative.
        probes: a step, where probes are used.
        memory_bytes: for held gradients; a group that exceeds it alone streams a pass of the data
            each half-step or round of steps.
        seed: of the probes.

    Raises:
        UnknownName: an option is none of its choices.
        ValueError: the solver cannot do what is wanted, or a number is out of range.
    """

    structure: Structure = "kronecker"
    solver: SolverName = "auto"
    objective: Objective = "expected"
    warm_start: WarmStart = "moments"
    shrinkage: float = 0.5
    sweeps: int = 5
    refine_sweeps: int = 2
    mask_fit: MaskFit = "damped"
    cg_iterations: int = 4
    block_size: int = 64
    steps: int = 200
    refine_steps: int = 80
    preconditioned_steps: int = 0
    learning_rate: float = 0.02
    probes: int = 16
    memory_bytes: int = 2 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise UnknownName(name, getattr(self, name), get_args(kind))
        least_one = ("sweeps", "refine_sweeps", "cg_iterations", "block_size", "steps")
        for name in (*least_one, "refine_steps", "probes", "memory_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if not 0 <= self.preconditioned_steps < min(self.steps, self.refine_steps):
            raise ValueError(
                "preconditioned_steps: expected fewer than steps and refine_steps, so that plain "
                f"steps come last, got {self.preconditioned_steps}."
            )
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage: expected 0 to 1, got {self.shrinkage}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected > 0, got {self.learning_rate}.")
        unfit = {self.solver, self.objective, self.mask_fit, self.warm_start}
        unfit &= {"adam", "probe", "exact", "identity", "diagonal"}
        if self.structure == "eigen" and unfit:
            raise ValueError(
                "structure: 'eigen' takes its basis from the warm start 'kfac' or 'moments', has a "
                f"closed form, and masks gradients; expected none of {sorted(unfit)}."
            )
        has_alternating = {"kronecker", "eigen", *CLOSED_FORM}
        if self.solver == "alternating" and self.structure not in has_alternating:
            raise ValueError(
                f"solver: no alternating half-steps for the structure {self.structure!r}; "
                "use 'adam', or the structure 'kronecker'."
            )
        if self.solver == "alternating" and self.objective == "probe":
            raise ValueError("objective: 'probe' needs the solver 'adam'; half-steps are exact.")
