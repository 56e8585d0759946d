"""The interface of blocks of Q: symmetric positive definite operators on one group's matrix.

V has the shape (..., rows, columns) and is vectorised row-major; Q acts on vec(V).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Resolvent = Callable[[Tensor, float], Tensor]
"""V and rho -> (Q^-1 + rho I)^-1 vec(V) as a matrix, for V (..., rows, columns) and rho >= 0."""


class AbstractBlock(ABC):
    """One block of the inverse curvature Q, over a (rows, columns) matrix.

    Concrete blocks are final. Tensors are the block's own; nothing passed in is modified.
    """

    shape: tuple[int, int]

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Return Q vec(V) as a matrix, for V of shape (..., rows, columns)."""

    @abstractmethod
    def invert(self) -> AbstractBlock:
        """Return the block of Q^-1, in closed form and the same dtype; for accuracy, of `double`.

        Raises:
            NotPositiveDefinite: rounding has made a factor indefinite.
        """

    @abstractmethod
    def resolvent(self) -> Resolvent:
        """Return V, rho -> (Q^-1 + rho I)^-1 vec(V), which takes further rho at no further cost."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return diag(Q) as a (rows, columns) matrix."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """Return log det Q, a scalar tensor."""

    @abstractmethod
    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index], (..., n, n), for flat row-major positions `index` (..., n)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define the block, which are saved and counted."""

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> AbstractBlock:
        """Return the block of `shape` that `tensors()` described."""
        return cls(**tensors)  # a block's constructor takes its tensors by name

    def of_rows(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the part of Q within each row, (n, s, s).

        Args:
            rows: (n), int64.
            columns: (s) of every row or (n, s) of each, int64; None is all.
        """
        index = torch.arange(self.shape[1], device=rows.device) if columns is None else columns
        return self.submatrix(rows.unsqueeze(1) * self.shape[1] + index)

    def invert_rows(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the inverse of the part of Q within each row, at `columns` (n, s), (n, s, s).

        The whole row is inverted; `columns` are entries of the inverse. This default costs
        O(n columns^3).
        """
        inverse = torch.linalg.inv(self.of_rows(rows))
        number = torch.arange(len(rows), device=rows.device)[:, None, None]
        return inverse[number, columns.unsqueeze(2), columns.unsqueeze(1)]

    @property
    def row_runs(self) -> int:
        """Number of equal runs of consecutive rows that Q does not couple with one another."""
        return 1

    def double(self) -> AbstractBlock:
        """Return the same block in float64."""
        return self.restore(
            {name: one.double() for name, one in self.tensors().items()}, self.shape
        )

    def trace(self) -> Tensor:
        """Return tr Q, a scalar tensor."""
        return self.diagonal().sum()

    def squared_norm(self, mask: Tensor | None = None) -> Tensor:
        """Return ||M o Q o M||_F^2, a scalar tensor, for a bool `mask` (rows, columns) or None.

        This default makes one product a survivor, in chunks; blocks with a closed form override.
        """
        rows, columns = self.shape
        like = next(iter(self.tensors().values()))
        keep = (
            torch.ones(self.shape, dtype=torch.bool, device=like.device) if mask is None else mask
        )
        total = like.new_zeros(())
        for chunk in keep.flatten().nonzero().flatten().split(256):
            unit = like.new_zeros(len(chunk), rows * columns)
            unit.scatter_(1, chunk.unsqueeze(1), 1.0)
            total = total + (self.matvec(unit.unflatten(1, self.shape)) * keep).square().sum()
        return total

    def dense(self) -> Tensor:
        """Return Q as a dense (rows columns, rows columns) matrix; for tests and small blocks."""
        n = self.shape[0] * self.shape[1]
        like = next(iter(self.tensors().values()))
        eye = torch.eye(n, dtype=like.dtype, device=like.device)
        return self.matvec(eye.reshape(n, *self.shape)).reshape(n, n).mT

    def memory_bytes(self) -> int:
        """Return the bytes that the block's tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def log_det_of(factors: Tensor) -> Tensor:
    """Return the log determinants (...) of symmetric positive definite matrices (..., n, n).

    By Cholesky, in the matrices' dtype; not a number where a matrix is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(factors)
    logs = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.where(failed == 0, logs, torch.nan)


def resolve(values: Tensor, rho: float) -> Tensor:
    """Return 1 / (1 / q + rho) of the eigenvalues q of Q, which are those of its resolvent."""
    return values / (1 + rho * values)
