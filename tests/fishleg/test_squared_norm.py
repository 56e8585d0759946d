"""Each block's squared norm, masked or not, against its dense matrix."""

import pytest
import torch

from fishleg.blocks import (
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    KroneckerBlock,
    LowRankBlock,
    SharedBlock,
)
from fishleg.blocks.base import AbstractBlock

SHAPE = (4, 5)


def positive(*shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    factor = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return factor @ factor.mT + torch.eye(shape[-1], dtype=torch.float64)


def blocks() -> list[AbstractBlock]:
    rows, columns = SHAPE
    orthogonal = [torch.linalg.eigh(positive(1, n, n))[1] for n in SHAPE]
    values = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [
        DiagonalBlock(values),
        DenseBlock(positive(3, 8, 8), SHAPE),  # the last chunk is padded
        EigenBlock(*orthogonal, values.unsqueeze(0)),
        KroneckerBlock(positive(rows, rows), positive(columns, columns), values),
        SharedBlock(positive(2, columns, columns), SHAPE),
        LowRankBlock(0.1 * values.expand(2, *SHAPE), torch.tensor(0.5, dtype=torch.float64)),
    ]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: type(block).__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_squared_norm(block: AbstractBlock, masked: bool) -> None:
    mask = torch.arange(20).reshape(SHAPE) % 3 > 0 if masked else None
    dense = block.dense()
    if mask is not None:
        dense = dense * mask.flatten() * mask.flatten()[:, None]
    torch.testing.assert_close(block.squared_norm(mask), dense.square().sum())
