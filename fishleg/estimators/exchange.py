"""The exchange of blocks between the processes of a rank group, which divide their making."""

from __future__ import annotations

from collections.abc import Mapping

from fishleg.blocks import BLOCKS, AbstractBlock
from fishleg.gradients.source import GradientSource
from fishleg.parameters import ParameterGroup


def block_cost(group: ParameterGroup) -> float:
    """Return the cost of making a group's block, in units that compare groups: r c (r + c)."""
    return float(group.size * (group.rows + group.columns))


def exchange_blocks(
    source: GradientSource, mine: Mapping[str, AbstractBlock], owners: Mapping[str, int]
) -> dict[str, AbstractBlock]:
    """Return group name -> block of all groups in `owners`, in their partition's order.

    Args:
        source: of the rank group that made them.
        mine: the blocks of this process.
        owners: group name -> rank of the process that has its block.
    """
    if source.rank_group.size == 1:
        return dict(mine)
    blocks: dict[str, AbstractBlock] = {}
    for name in [name for name in source.partition.names if name in owners]:
        block, group = mine.get(name), source.partition[name]
        tensors, kind = source.rank_group.broadcast(
            {} if block is None else block.tensors(),
            None if block is None else type(block).__name__,
            owner=owners[name],
            device=str(source.model.get_parameter(group.weight).device),
        )
        blocks[name] = block or BLOCKS[kind].restore(tensors, group.shape)
    return blocks
