"""A diagonal block: one number a parameter."""

from __future__ import annotations

from torch import Tensor

from fishleg.blocks.base import AbstractBlock, Resolvent, resolve
from fishleg.errors import ShapeMismatch


class DiagonalBlock(AbstractBlock):
    """Q = diag(vec(values)).

    Args:
        values: (rows, columns), positive.

    Raises:
        ShapeMismatch: `values` is not a matrix.
    """

    def __init__(self, values: Tensor):
        if values.ndim != 2:
            raise ShapeMismatch(f"values: expected (rows, columns), got {tuple(values.shape)}.")
        self.values = values
        self.shape = (values.shape[0], values.shape[1])

    def matvec(self, v: Tensor) -> Tensor:
        """Return values o V, for V of shape (..., rows, columns). Cost O(rows columns)."""
        return self.values * v

    def invert(self) -> DiagonalBlock:
        """Return diag(vec(1 / values))."""
        return DiagonalBlock(1 / self.values)

    def resolvent(self) -> Resolvent:
        """Return V, rho -> V o values / (1 + rho values)."""
        return lambda v, rho: resolve(self.values, rho) * v

    def diagonal(self) -> Tensor:
        """Return diag(Q), (rows, columns)."""
        return self.values.clone()

    def log_det(self) -> Tensor:
        """Return the sum of the values' logarithms."""
        return self.values.log().sum()

    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index], (..., n, n), for flat positions `index` (..., n)."""
        picked = self.values.flatten()[index]
        same = index[..., :, None] == index[..., None, :]
        return picked[..., :, None] * same

    def squared_norm(self, mask: Tensor | None = None) -> Tensor:
        """Return ||M o Q o M||_F^2, the sum of the squared values, masked."""
        return (self.values if mask is None else self.values * mask).square().sum()

    def tensors(self) -> dict[str, Tensor]:
        """Return {"values": (rows, columns)}."""
        return {"values": self.values}
