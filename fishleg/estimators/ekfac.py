"""EK-FAC: the eigenbasis of K-FAC, with the curvature that is measured along it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.eigen import EigenBlock
from fishleg.estimators.kfac import KFAC
from fishleg.estimators.onepass import AbstractOnePassEstimator
from fishleg.gradients import GradientSource
from fishleg.memory import Footprint
from fishleg.moments import Progress, accumulate
from fishleg.parameters import Partition


class EKFAC(AbstractOnePassEstimator):
    """Q = B diag( 1 / (lambda + damping) ) B^T, B = U (x) W the eigenbasis of `KFAC`'s factors.

    lambda = E[(U^T G W)^o2], the second moments of the per-sample gradients G in that basis, take
    the place of K-FAC's products of eigenvalues (George et al., arXiv 1806.03884, theorem 2): of
    all diagonals in the basis they are the nearest to F in the Frobenius norm, and the minimiser of
    the FishLeg objective. So FishLeg with `structure: eigen`, `warm_start: kfac` and no shrinkage
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
    remedy = KFAC.remedy
    restricts = False
    passes = 1 + KFAC.passes
    options = ("dense_size",)

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        dense_size: int = 1024,
        memory_limit: int | None = None,
    ):
        super().__init__(partition, damping=damping, memory_limit=memory_limit)
        self.dense_size = dense_size

    def _estimate(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None, progress: Progress
    ) -> dict[str, AbstractBlock]:
        kfac = self._kfac()
        kfac.fit(source, lambda fit: progress(fit.done))
        blocks = kfac.blocks()
        bases = {name: one for name, one in blocks.items() if isinstance(one, EigenBlock)}
        sums = accumulate(
            source,
            {name: partial(_energies, basis) for name, basis in bases.items()},
            groups=list(bases),
            progress=lambda done: progress(KFAC.passes * source.rows + done),
        )
        for name, (curvature,) in sums.items():
            left, right = bases[name].left, bases[name].right
            values = (1 / (curvature + self.damping)).to(left.dtype)
            blocks[name] = EigenBlock(left, right, values)
        return blocks

    def _kfac(self) -> KFAC:
        options: dict[str, Any] = {name: getattr(self, name) for name in self.options}
        return KFAC(self.partition, damping=self.damping, memory_limit=self.memory_limit, **options)

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return what fitting group `name` needs; see the class."""
        size, bytes_each = self.partition[name].size, source.element_size(name)
        basis = self._kfac().footprint(source, name)
        return Footprint(
            held=basis.held,
            sums=max(basis.sums, basis.held + 8 * size),
            work=max(basis.work, 4 * bytes_each * source.batch_size * size),
        )


def _energies(basis: EigenBlock, gradients: Tensor) -> tuple[Tensor]:
    return (basis.energies(gradients),)
