"""A group of ranks that share a fit: each takes a part of the data, or makes a part of the blocks.

The ranks are those of torch.distributed's default process group, which their launcher has set up.
All ranks must call the communicating methods equally often and in the same order. Messages are raw
bytes and JSON, never pickles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fishleg.checks import check_integer


@dataclass(frozen=True)
class RankGroup:
    """This process's rank among those that share a fit; by default a single one, without messages.

    Attributes:
        rank: of this process, 0 <= rank < size.
        size: number of ranks.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        check_integer("rank", self.rank)
        check_integer("size", self.size)

    def part(self, count: int, rank: int | None = None) -> slice:
        """Return a rank's part of `count` items (default: this rank's), in rank order."""
        rank = self.rank if rank is None else rank
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def assign(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Return name -> its rank: most expensive first, to the least-loaded rank."""
        loads = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: -costs[name]):  # stable: ties keep their order
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return owners

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, with the same bits on all ranks."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.all_reduce(whole)
                if whole is not tensor:
                    tensor.copy_(whole)

    def any(self, flag: bool) -> bool:
        """Tell whether the flag of any rank is set."""
        count = torch.tensor([int(flag)])
        self.sum([count])
        return bool(count)

    def broadcast(
        self,
        tensors: Mapping[str, Tensor],
        meta: Any = None,
        *,
        owner: int = 0,
        device: str = "cpu",
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the tensors and the JSON-able `meta` of rank `owner`; those of others are ignored.

        Args:
            tensors: name -> tensor of any dtype and shape.
            meta: further values.
            owner: the rank that sends.
            device: of the received tensors; of the same kind as the owner's.
        """
        if self.size == 1:
            return dict(tensors), meta
        mine = self.rank == owner
        shapes = [[name, str(t.dtype)[6:], list(t.shape)] for name, t in tensors.items()]
        header = json.dumps([meta, shapes]).encode() if mine else b""
        length = torch.tensor([len(header)])
        dist.broadcast(length, owner)
        text = torch.frombuffer(bytearray(header.ljust(int(length))), dtype=torch.uint8)
        dist.broadcast(text, owner)
        if mine:
            for tensor in tensors.values():
                _broadcast_bytes(tensor.detach().contiguous(), owner)
            return dict(tensors), meta
        meta, shapes = json.loads(bytes(text.tolist()))
        found = {}
        for name, dtype, shape in shapes:
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            _broadcast_bytes(found[name], owner)
        return found, meta


ALONE = RankGroup()


def _broadcast_bytes(tensor: Tensor, owner: int) -> None:
    """Broadcast a contiguous tensor; as bytes, because not every backend knows every dtype."""
    if tensor.numel():
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), owner)
