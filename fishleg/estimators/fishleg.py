"""The FishLeg estimator: Q fitted to a fixed sample, group by group, and refined under masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from torch import Tensor

from fishleg.blocks import KroneckerBlock
from fishleg.blocks.structures import count_numbers, fit_structure
from fishleg.estimators.group_fit import AbstractGroupFit, block_structure, cast_block
from fishleg.estimators.groupwise import AbstractGroupwiseEstimator
from fishleg.moments import as_factors, kronecker_products, squares
from fishleg.options import CLOSED_FORM, FishLegChanges, FishLegOptions, Structure
from fishleg.parameters import Partition
from fishleg.solvers.adam import AdamSolver
from fishleg.solvers.alternating import AlternatingSolver
from fishleg.solvers.base import AbstractSolver, SolverState, total
from fishleg.solvers.closed import ClosedFormSolver
from fishleg.solvers.starts import start_from, whole_factors

_WARM_SWEEPS = 2  # alternating ones, before Adam begins to fit a scale too; cheaper than its steps


class FishLeg(AbstractGroupwiseEstimator):
    """Fits Q to a fixed sample by minimising J (or L), in each group independently.

    One family of structures of Q: two Kronecker factors, three for kernels (tensor), either with a
    scale for each weight; and dense blocks, a diagonal, or a full block. Kronecker factors are
    learned by exact half-steps, scales and three factors by Adam, dense and diagonal blocks in
    closed form. Other estimators have no structure to choose: `FLS` learns the same factors from
    fresh batches, as the paper does, and `Eigen` learns nothing but a basis.

    Time: a pass of the gradients a pack (and one of the layers' signals, to start from `kfac`), for
    any number of sweeps, and what the solver takes, N gradients a group: `alternating` 2 N r c
    (r + c) FLOPs a half-step and O(r^3 + c^3) for its inverse, `adam` about 6 times a half-step's
    n / N a step, the closed forms as `OBS`.
    Memory: s bytes for each of a block's numbers, see `structures.count_numbers`; while fitting
    also a pack's gradients, N s r c each and up to `memory_bytes`, its starts, 8 (r^2 / h + h
    c^2) each from `kfac`; and for the largest group 64 (r^2 + c^2) + 24 r c to invert its
    factors (40 times the numbers of a dense block, 12 s times with adam) beside 3 n s r c (8
    with adam).

    Args:
        partition: the groups.
        damping: gamma > 0.
        memory_limit: see `AbstractEstimator`.
        options: of the fit; None for the defaults.
        changes: fields of `FishLegOptions` that differ from `options`.

    Attributes:
        options: see `FishLegOptions`.
        report: see `AbstractGroupwiseEstimator`.
    """

    name = "fishleg"
    remedy = "a structure with smaller factors, or smaller memory_bytes"
    carries_blocks = True
    options: FishLegOptions

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        memory_limit: int | None = None,
        options: FishLegOptions | None = None,
        **changes: Unpack[FishLegChanges],
    ):
        super().__init__(
            partition,
            damping=damping,
            memory_limit=memory_limit,
            options=replace(options or FishLegOptions(), **changes),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user: of all estimates, and where a solver did less than asked."""
        found = list(super().warnings)
        for name, entry in self.report.items():
            if entry.get("rejected"):
                found.append(
                    f"{name}: {entry['rejected']} phases of Adam did not lower J and were undone; "
                    "lower learning_rate, or take more steps."
                )
            if entry.get("shortened"):
                found.append(
                    f"{name}: {entry['shortened']} half-steps would have lost positive "
                    "definiteness and were shortened; raise the damping, or lower cg_iterations."
                )
        return tuple(found)

    @property
    def _budget(self) -> int:
        """Bytes for the gradients that are held at once."""
        exact = self.masks is not None and self.options.mask_fit == "exact"
        return super()._budget // (2 if exact else 1)  # exact: images are held beside them

    def _fit_of(self, name: str) -> FishLegFit:
        return FishLegFit(self.partition[name], self.damping, self.options)


@dataclass(frozen=True)
class FishLegFit(AbstractGroupFit):
    """The fit of one group by FishLeg.

    Attributes:
        options: of the estimator.
    """

    options: FishLegOptions

    @property
    def structure(self) -> Structure:
        """The structure of the group's block."""
        return block_structure(self.options.structure, self.group)

    def solver(self, gradients: int, *, refines: bool, mask: Tensor | None) -> AbstractSolver:
        """Return the solver of the group's block; see `AbstractGroupFit`."""
        structure, options = self.structure, self.options
        wants_adam = options.solver == "adam" or options.objective == "probe"
        if structure in CLOSED_FORM and not (wants_adam and structure == options.structure):
            return ClosedFormSolver(self.damping, mask, objective=options.objective)
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

    @property
    def from_layer(self) -> bool:
        """Whether the first block is made of the K-FAC factors of the group's layer."""
        return self.options.warm_start == "kfac" and self.structure not in CLOSED_FORM

    def start(
        self, pieces: Iterable[Tensor], factors: Sequence[Tensor] | None, like: Tensor
    ) -> SolverState:
        """Return the state with the group's first block; see `AbstractGroupFit`."""
        structure, kind = self.structure, self.options.warm_start
        extra: dict[str, Tensor] = {}
        statistics: Sequence[Tensor] | None = None
        if kind == "diagonal":
            statistics = total(pieces, squares)
        elif kind != "identity" and structure not in CLOSED_FORM:
            statistics = factors or as_factors(*total(pieces, kronecker_products))
            if self.options.pull:
                extra = dict(zip(("prior.b", "prior.c"), whole_factors(*statistics), strict=True))
        start = start_from(statistics, structure, self.group.shape, self.damping, like)
        if structure == "kronecker_scaled" and start.scale is None:
            solver = AlternatingSolver(self.damping, _WARM_SWEEPS)
            *_, swept = solver.run(pieces, SolverState(block=cast_block(start, like)))
            start = KroneckerBlock(**swept.block.tensors())
        block = fit_structure(
            start, structure, kernel=self.group.kernel, block_size=self.options.block_size
        )
        return SolverState(block=cast_block(block, like), extra=extra)

    def count(self, conv_groups: int) -> int:
        """Return the count of numbers in the block."""
        del conv_groups  # they share one column factor
        return count_numbers(self.structure, self.group, block_size=self.options.block_size)
