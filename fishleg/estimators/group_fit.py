"""The fit of one group: its structure, its solver, its first block, and its memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fishleg.blocks import AbstractBlock
from fishleg.memory import Footprint
from fishleg.options import CLOSED_FORM, Structure
from fishleg.parameters import ParameterGroup
from fishleg.solvers.base import AbstractSolver, SolverState

_SMALL_VECTOR = 1024  # parameters up to which a vector's block is dense


@dataclass(frozen=True)
class AbstractGroupFit(ABC):
    """The fit of one group.

    Attributes:
        group: to fit.
        damping: gamma > 0.
    """

    group: ParameterGroup
    damping: float

    @property
    @abstractmethod
    def structure(self) -> str:
        """The structure of the group's block, as the report names it."""

    @property
    @abstractmethod
    def from_layer(self) -> bool:
        """Whether the first block is made of the K-FAC factors of the group's layer."""

    @abstractmethod
    def solver(self, gradients: int, *, refines: bool, mask: Tensor | None) -> AbstractSolver:
        """Return the solver of the group's block.

        Args:
            gradients: rows of a pass.
            refines: whether it refines a fitted block under new masks.
            mask: survivors, bool (rows, columns), or None.
        """

    @abstractmethod
    def start(
        self, pieces: Iterable[Tensor], factors: Sequence[Tensor] | None, like: Tensor
    ) -> SolverState:
        """Return the state with the group's first block.

        Args:
            pieces: gradients, as the solver takes them.
            factors: K-FAC factors of the group's layer, or None where there are none.
            like: a tensor of the block's dtype and device.
        """

    @abstractmethod
    def count(self, conv_groups: int) -> int:
        """Return the count of numbers in the block; `conv_groups` is that of the layer, or 1."""

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
        numbers, group = self.count(conv_groups or 1), self.group
        squares_of_sides = group.rows**2 + group.columns**2
        dense = self.structure in CLOSED_FORM
        inverting = 40 * numbers if dense else 64 * squares_of_sides + 24 * group.size
        descending = 12 * bytes_each * numbers if uses_adam else 0
        h = conv_groups or 1
        factors = 8 * (group.rows**2 // h + h * group.columns**2) if self.from_layer else 0
        return Footprint(
            held=bytes_each * numbers,
            sums=bytes_each * numbers + factors,
            work=max(inverting, descending)
            + (8 if uses_adam else 3) * bytes_each * rows_at_once * group.size,
        )


def block_structure(wanted: Structure, group: ParameterGroup) -> Structure:
    """Return the structure of a group's block, where `wanted` is that of kernels and matrices."""
    if wanted in CLOSED_FORM:
        return wanted
    if is_small_vector(group):
        return "full"
    if wanted.startswith("tensor") and group.kernel == 1:
        return "kronecker_scaled" if wanted.endswith("_scaled") else "kronecker"
    return wanted


def is_small_vector(group: ParameterGroup) -> bool:
    """Tell whether a group is a vector whose block is dense in place of factors."""
    return len(group.weight_shape) < 2 and group.size <= _SMALL_VECTOR


def cast_block(block: AbstractBlock, like: Tensor) -> AbstractBlock:
    """Return the block in the dtype and on the device of `like`, its tensors contiguous."""
    tensors = {name: tensor.to(like).contiguous() for name, tensor in block.tensors().items()}
    return type(block).restore(tensors, block.shape)
