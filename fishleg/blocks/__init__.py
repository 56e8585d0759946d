"""Blocks of Q: symmetric positive definite operators on one parameter group."""

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.dense import DenseBlock
from fishleg.blocks.diagonal import DiagonalBlock
from fishleg.blocks.eigen import EigenBlock
from fishleg.blocks.kronecker import KroneckerBlock
from fishleg.blocks.low_rank import GramBlock, LowRankBlock
from fishleg.blocks.shared import SharedBlock
from fishleg.blocks.tensor import TensorBlock

BLOCKS: dict[str, type[AbstractBlock]] = {
    block.__name__: block
    for block in (
        DenseBlock,
        DiagonalBlock,
        EigenBlock,
        GramBlock,
        KroneckerBlock,
        SharedBlock,
        TensorBlock,
        LowRankBlock,
    )
}

__all__ = [
    "BLOCKS",
    "AbstractBlock",
    "DenseBlock",
    "DiagonalBlock",
    "EigenBlock",
    "GramBlock",
    "KroneckerBlock",
    "SharedBlock",
    "TensorBlock",
    "LowRankBlock",
]
