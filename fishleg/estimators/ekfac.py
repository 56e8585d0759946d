"""EK-FAC: the eigenbasis of K-FAC, with the curvature that is measured along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from fishleg.blocks.eigen import EigenBlock
from fishleg.estimators.kfac import KFAC
from fishleg.estimators.onepass import DataPass
from fishleg.gradients.running_sums import Progress, RunningSums
from fishleg.gradients.source import GradientSource
from fishleg.memory import Footprint
from fishleg.moments import accumulate


class EKFAC(KFAC):
    """Q = B diag( 1 / (lambda + damping) ) B^T, B = U (x) W the eigenbasis of `KFAC`'s factors.

    lambda = E[(U^T G W)^o2], the second moments of the per-sample gradients G in that basis, take
    the place of K-FAC's products of eigenvalues (George et al., arXiv 1806.03884, theorem 2): of
    all diagonals in the basis they are the nearest to F in the Frobenius norm, and the minimiser of
    the FishLeg objective. So `Eigen` with the basis `kfac` and no shrinkage
    is this on layers; its shrinkage tames the noise of as many lambda as weights. Groups without
    a layer are treated as in `KFAC`; those with a dense block are exact already.

    Time: as `KFAC`, then a pass of the gradients and 2 N r c (r + c) FLOPs a group. Memory: as
    `KFAC`; in the last pass 8 r c bytes of float64 sums a group, and 4 n s r c for the largest.

    Args:
        partition: the groups.
        damping: gamma > 0.
        dense_size: entries up to which a group without a layer gets its full Fisher.
        memory_limit: see `AbstractEstimator`.
    """

    name = "ekfac"
    averages = False

    def _passes(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> Sequence[DataPass]:
        bases: dict[str, EigenBlock] = {}

        def measure(*, running: RunningSums, progress: Progress) -> None:
            bases.update((n, b) for n, b in self._blocks.items() if isinstance(b, EigenBlock))
            moments = {name: partial(_energies, basis) for name, basis in bases.items()}
            accumulate(source, moments, groups=list(bases), running=running, progress=progress)

        def rescale(name: str, sums: list[Tensor]) -> EigenBlock:
            basis = bases[name]
            return EigenBlock(basis.left, basis.right, 1 / (sums[0] + self.damping))

        return [*super()._passes(source, masks), DataPass(measure, rescale)]

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that fitting group `name` needs; see the class."""
        size, bytes_each = self.partition[name].size, source.element_size(name)
        basis = super().footprint(source, name)
        return Footprint(
            held=basis.held,
            sums=max(basis.sums, basis.held + 8 * size),
            work=max(basis.work, 4 * bytes_each * source.rows_at_once * size),
        )


def _energies(basis: EigenBlock, gradients: Tensor) -> tuple[Tensor]:
    return (basis.energies(gradients),)
