"""The ranks of a stage that runs in several processes: their connection, and their equal state.

A stage does its work in `with joined(ctx) as rank_group:`; a single process connects to nothing.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from fishleg.gradients.rank_group import ALONE, RankGroup
from pipeline.stage import Context

# The time that a rank waits for the others, as for one that measures the validation split. The
# executor notices a rank that dies at once; this limit is for one that hangs.
_PATIENCE = timedelta(hours=1)


@contextmanager
def joined(ctx: Context) -> Iterator[RankGroup]:
    """Connect this process with the stage's other ranks, and yield their rank group.

    Tensors on a GPU travel by NCCL, those on a CPU by gloo. After an error the connections stay
    open: the other ranks wait until the executor ends them. If they failed for lack of this rank,
    their errors would hide the cause.
    """
    if ctx.world_size == 1:
        yield ALONE
        return
    if ctx.rendezvous:
        if ctx.rendezvous.startswith("file:"):  # all on this machine, and private
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group(
            "gloo" if ctx.device == "cpu" else "cpu:gloo,cuda:nccl",
            init_method=ctx.rendezvous,
            rank=ctx.rank,
            world_size=ctx.world_size,
            timeout=_PATIENCE,
        )
    yield RankGroup(ctx.rank, ctx.world_size)
    if ctx.rendezvous:
        dist.destroy_process_group()


def require_equal(rank_group: RankGroup, tensors: Mapping[str, Tensor]) -> None:
    """Check that all ranks hold the same bits; every rank must call this.

    Raises:
        RuntimeError: on all ranks, if they do not.
    """
    if rank_group.size == 1:
        return
    mine = torch.tensor(_digest(tensors))
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise RuntimeError(
            f"The {rank_group.size} workers no longer hold the same weights and masks: their "
            f"digests lie between {int(lowest):x} and {int(highest):x}, expected one. The last "
            "checkpoint, at which they were equal, is kept."
        )


def _digest(tensors: Mapping[str, Tensor]) -> int:
    """Return 63 bits of the sha256 over names and values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        values = tensors[name].detach().cpu().contiguous().reshape(-1)
        if values.numel():
            total.update(values.view(torch.uint8).numpy().data)
    return int.from_bytes(total.digest()[:8], "big") >> 1
