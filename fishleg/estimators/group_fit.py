"""The fit of one group by FishLeg: its structure, its solver, its first block, and its memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fishleg.blocks import AbstractBlock, KroneckerBlock
from fishleg.blocks.eigen import invert_factors
from fishleg.blocks.structures import count_numbers, fit_structure
from fishleg.linalg import invert_damped
from fishleg.memory import Footprint
from fishleg.moments import as_factors, kronecker_products, squares
from fishleg.options import CLOSED_FORM, FishLegOptions, Structure
from fishleg.parameters import ParameterGroup
from fishleg.solvers.adam import AdamSolver
from fishleg.solvers.alternating import AlternatingSolver
from fishleg.solvers.base import AbstractSolver, SolverState, total
from fishleg.solvers.closed import ClosedFormSolver
from fishleg.solvers.starts import diagonal_start, factored_start, identity_start

_SMALL_VECTOR = 1024  # parameters up to which a vector's block is dense
_OWN_DAMPING = 0.1  # of factors that are damped exactly afterwards, in units of the damping
_WARM_SWEEPS = 2  # alternating ones, before Adam begins to fit a scale too; cheaper than its steps


@dataclass(frozen=True)
class GroupFit:
    """The fit of one group by FishLeg.

    Attributes:
        options: of the estimator.
        group: to fit.
        damping: gamma > 0.
    """

    options: FishLegOptions
    group: ParameterGroup
    damping: float

    @property
    def structure(self) -> Structure:
        """The structure of the group's block."""
        return block_structure(self.options.structure, self.group)

    def solver(self, gradients: int, *, refines: bool, mask: Tensor | None) -> AbstractSolver:
        """Return the solver of the group's block.

        Args:
            gradients: rows of a pass.
            refines: whether it refines a fitted block under new masks.
            mask: survivors, bool (rows, columns), or None.
        """
        structure, options = self.structure, self.options
        wants_adam = options.solver == "adam" or options.objective == "probe"
        if structure in CLOSED_FORM and not (wants_adam and structure == options.structure):
            return ClosedFormSolver(self.damping, mask, objective=options.objective)
        if structure == "eigen":
            return ClosedFormSolver(
                self.damping, mask, shrinkage=options.shrinkage, objective=options.objective
            )
        if structure == "kronecker" and not wants_adam:
            return AlternatingSolver(
                self.damping,
                options.refine_sweeps if refines else options.sweeps,
                mask,
                mask_fit=options.mask_fit,
                iterations=options.cg_iterations,
                objective=options.objective,
                pull=0.0 if refines else options.pull,
            )
        return AdamSolver(
            self.damping,
            options,
            gradients,
            options.refine_steps if refines else options.steps,
            mask,
            restrict=options.mask_fit == "exact",
        )

    def warm_start(
        self, pieces: Iterable[Tensor], factors: Sequence[Tensor] | None, like: Tensor
    ) -> SolverState:
        """Return the state with the group's first block.

        Args:
            pieces: gradients, as the solver takes them.
            factors: K-FAC factors of the group's layer, or None where there are none.
            like: a tensor of the block's dtype and device.
        """
        structure, kind = self.structure, self.options.warm_start
        extra: dict[str, Tensor] = {}
        if kind == "identity" or (structure in CLOSED_FORM and kind in {"kfac", "moments"}):
            start = identity_start(self.group.shape, self.damping, like)
        elif kind == "diagonal":
            scaled = structure.endswith("_scaled") or structure in CLOSED_FORM
            (fisher,) = total(pieces, squares)
            start = diagonal_start(fisher, self.damping, scaled=scaled)
        else:
            # of each convolution group
            gamma, a = factors or as_factors(*total(pieces, kronecker_products))
            if structure == "eigen":
                if kind == "log_det":
                    gamma, a = self._learned_factors(pieces, gamma, a, like)
                return SolverState(block=cast_block(invert_factors(gamma, a, self.damping), like))
            # elsewhere the convolution groups share one column factor
            row, column = torch.block_diag(*gamma), a.mean(0)
            start = factored_start(row, column, self.damping)
            if self.options.pull:
                extra = {"prior.b": row, "prior.c": column}
        if structure == "kronecker_scaled" and start.scale is None:
            solver = AlternatingSolver(self.damping, _WARM_SWEEPS)
            *_, swept = solver.run(pieces, SolverState(block=cast_block(start, like)))
            start = KroneckerBlock(**swept.block.tensors())
        block = fit_structure(
            start, structure, kernel=self.group.kernel, block_size=self.options.block_size
        )
        return SolverState(block=cast_block(block, like), extra=extra)

    def _learned_factors(
        self, pieces: Iterable[Tensor], gamma: Tensor, a: Tensor, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the inverses of the factors that log-det half-steps learn, float64 (1, n, n)."""
        damping = self.damping * _OWN_DAMPING
        start = factored_start(torch.block_diag(*gamma), a.mean(0), damping)
        solver = AlternatingSolver(damping, self.options.sweeps, objective="log_det")
        state = SolverState(block=cast_block(start, like))
        *_, last = solver.run(pieces, state)
        b, c = (invert_damped(one.double(), 0.0)[None] for one in last.block.tensors().values())
        return b, c

    def footprint(
        self, bytes_each: int, conv_groups: int | None, rows_at_once: int, *, uses_adam: bool
    ) -> Footprint:
        """Return the bytes that the fit needs, beside the gradients in a pack.

        Args:
            bytes_each: of one number.
            conv_groups: h, of the group's layer; None where the group is no layer's weight.
            rows_at_once: gradient rows in a batch.
            uses_adam: whether Adam is the solver.
        """
        structure, kind = self.structure, self.options.warm_start
        from_layers = kind in {"kfac", "log_det"}
        h = (conv_groups if kind == "kfac" else None) or 1
        numbers = count_numbers(
            structure, self.group, conv_groups=h, block_size=self.options.block_size
        )
        dense = structure in CLOSED_FORM
        squares_of_sides = self.group.rows**2 + self.group.columns**2
        inverting = 40 * numbers if dense else 64 * squares_of_sides + 24 * self.group.size
        descending = 12 * bytes_each * numbers if uses_adam else 0
        own = (conv_groups if from_layers else None) or 1
        factors = self.group.rows**2 // own + own * self.group.columns**2
        return Footprint(
            held=bytes_each * numbers,
            sums=bytes_each * numbers + (8 * factors if from_layers and not dense else 0),
            work=max(inverting, descending)
            + (8 if uses_adam else 3) * bytes_each * rows_at_once * self.group.size,
        )


def block_structure(wanted: Structure, group: ParameterGroup) -> Structure:
    """Return the structure of a group's block, where `wanted` is that of kernels and matrices."""
    if wanted in CLOSED_FORM:
        return wanted
    if len(group.weight_shape) < 2 and group.size <= _SMALL_VECTOR:
        return "full"
    if wanted.startswith("tensor") and group.kernel == 1:
        return "kronecker_scaled" if wanted.endswith("_scaled") else "kronecker"
    return wanted


def cast_block(block: AbstractBlock, like: Tensor) -> AbstractBlock:
    """Return the block in the dtype and on the device of `like`, its tensors contiguous."""
    tensors = {name: tensor.to(like).contiguous() for name, tensor in block.tensors().items()}
    return type(block).restore(tensors, block.shape)
