"""An estimator whose Q is any dense matrix a test likes, and partitions to go with it."""

from __future__ import annotations

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock, Resolvent
from fishleg.estimators.base import AbstractEstimator
from fishleg.parameters import ParameterGroup, Partition


class ExactBlock(AbstractBlock):
    """Q as the dense matrix it is."""

    def __init__(self, matrix: Tensor, shape: tuple[int, int]):
        self.matrix = matrix
        self.shape = shape

    def matvec(self, v: Tensor) -> Tensor:
        return (v.flatten(-2) @ self.matrix).reshape(v.shape)

    def invert(self) -> ExactBlock:
        return ExactBlock(torch.linalg.inv(self.matrix), self.shape)

    def resolvent(self) -> Resolvent:
        precision = torch.linalg.inv(self.matrix)
        eye = torch.eye(len(precision), dtype=precision.dtype)
        return lambda v, rho: ExactBlock(
            torch.linalg.inv(precision + rho * eye), self.shape
        ).matvec(v)

    @classmethod
    def restore(cls, tensors, shape) -> ExactBlock:
        return cls(tensors["matrix"], shape)

    def log_det(self) -> Tensor:
        return torch.linalg.slogdet(self.dense())[1]

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().reshape(self.shape)

    def submatrix(self, index: Tensor) -> Tensor:
        return self.matrix[index.unsqueeze(-1), index.unsqueeze(-2)]

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}


class ExactEstimator(AbstractEstimator):
    """Holds the blocks, and the support, that it was given."""

    name = "exact"

    def __init__(
        self,
        partition: Partition,
        blocks: dict[str, Tensor],
        *,
        damping: float = 1.0,
        masks: dict[str, Tensor] | None = None,
    ):
        super().__init__(partition, damping=damping)
        self._blocks = {
            name: ExactBlock(matrix, partition[name].shape) for name, matrix in blocks.items()
        }
        self.masks = masks

    # Its blocks are given, so nothing is fitted or stored: a test that tries has a defect.

    def fit(self, source, callback=None, *, resume=False):
        raise NotImplementedError

    def refine(self, source, masks, callback=None):
        raise NotImplementedError

    def footprint(self, source, name):
        raise NotImplementedError

    def state_dict(self):
        raise NotImplementedError

    def load_state_dict(self, state):
        raise NotImplementedError


def group(name: str, rows: int, columns: int, *, bias: bool = False) -> ParameterGroup:
    """A prunable (rows, columns) weight, with its bias if wanted."""
    return ParameterGroup(
        name=name,
        weight=f"{name}.weight",
        bias=f"{name}.bias" if bias else None,
        weight_shape=(rows, columns),
        prunable=True,
    )


def exact(hessian: Tensor, rows: int, columns: int, masks: Tensor | None = None) -> ExactEstimator:
    """An estimator over one group `a` without bias: Q the inverse of the Hessian's survivors."""
    partition = Partition((group("a", rows, columns),))
    if masks is None:
        return ExactEstimator(partition, {"a": torch.linalg.inv(hessian)})
    inside = masks.flatten()
    inverse = torch.zeros_like(hessian)
    inverse[inside[:, None] & inside[None, :]] = torch.linalg.inv(
        hessian[inside][:, inside]
    ).flatten()
    return ExactEstimator(partition, {"a": inverse}, masks={"a": masks})
