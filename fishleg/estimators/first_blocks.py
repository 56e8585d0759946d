"""The blocks that a descent begins at, and the passes over the data that they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fishleg.blocks import AbstractBlock
from fishleg.blocks.structures import fit_structure
from fishleg.estimators.base import tensors_below
from fishleg.gradients.running_sums import Progress, RunningSums
from fishleg.gradients.source import GradientSource
from fishleg.moments import accumulate, as_factors, kronecker_products, layer_moments, squares
from fishleg.options import CLOSED_FORM, FlsStart, Structure
from fishleg.parameters import ParameterGroup
from fishleg.solvers.starts import start_from


class FirstBlocks:
    """First blocks of one kind for all groups; their statistics are summed resumably.

    Args:
        kind: of the start.
        passes: sums by the name of the pass, of an interrupted one.

    Cost: no pass (`identity`), one (`diagonal`, `moments`), or one and another of the groups that
    are no layer's weight (`kfac`).
    """

    def __init__(self, kind: FlsStart, passes: Mapping[str, RunningSums] | None = None):
        self._kind = kind
        self._passes = dict(passes or {})

    def sum(
        self, source: GradientSource, structures: Mapping[str, Structure], progress: Progress
    ) -> None:
        """Complete the passes for groups of these structures, from where they are."""
        if self._kind == "identity":
            return
        if self._kind == "diagonal":
            accumulate(source, squares, running=self._pass("squares"), progress=progress)
            return
        rest = [name for name, structure in structures.items() if structure not in CLOSED_FORM]
        if self._kind == "kfac":
            layers = self._pass("layers")
            found = layer_moments(source, rest, running=layers, progress=progress)
            rest = [name for name in rest if name not in found]
        if rest:
            products = self._pass("products")
            accumulate(source, kronecker_products, groups=rest, running=products, progress=progress)

    def block(
        self, group: ParameterGroup, structure: Structure, damping: float, like: Tensor
    ) -> AbstractBlock:
        """Return a group's first block, of a structure.

        Args:
            group: of the partition.
            structure: of its block.
            damping: gamma > 0.
            like: a tensor of the dtype and device of I / gamma.
        """
        found = {key: one.sums.get(group.name) for key, one in self._passes.items()}
        statistics = found.get("squares") or found.get("layers")
        if products := found.get("products"):
            statistics = [*as_factors(*products)]
        start = start_from(statistics, structure, group.shape, damping, like)
        return fit_structure(start, structure, kernel=group.kernel, block_size=group.size)

    def _pass(self, name: str) -> RunningSums:
        return self._passes.setdefault(name, RunningSums())

    def places(self) -> dict[str, Any]:
        """Return where the passes are, as JSON."""
        return {key: one.places() for key, one in self._passes.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums of the passes."""
        return {
            f"{key}/{name}": tensor
            for key, one in self._passes.items()
            for name, tensor in one.tensors().items()
        }

    @classmethod
    def restore(
        cls, kind: FlsStart, places: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> FirstBlocks:
        """Undo `places` and `tensors`."""
        return cls(
            kind,
            {
                key: RunningSums.restore(one, tensors_below(f"{key}/", tensors))
                for key, one in places.items()
            },
        )
