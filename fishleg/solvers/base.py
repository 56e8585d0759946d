"""The interface of all solvers: the layout of their data, their state, and their run.

A solver fits the block of one group to that group's scaled per-sample gradients. It gets them in
pieces of the layout (rows, n, columns), n gradients each: there, either factor of a Kronecker block
meets a whole piece in one large product without a copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock


@dataclass(frozen=True, kw_only=True)
class SolverState:
    """The state of one group's fit: with the data, all that resuming it needs.

    Attributes:
        block: Q so far; at the beginning, the warm start.
        done: units of work done, of the solver's `units`.
        extra: further tensors, such as moments.
        numbers: further numbers, JSON-able, and how the fit went; `objective` is J so far.
    """

    block: AbstractBlock
    done: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


class AbstractSolver(ABC):
    """Fits the block of one group, step by step.

    Args:
        damping: gamma > 0.
        mask: survivors, bool (rows, columns), at least one; None keeps all.
    """

    units: int

    def __init__(self, damping: float, mask: Tensor | None = None):
        self.damping = damping
        self.mask = mask

    def prepare(self, gradients: Tensor) -> Tensor:
        """Return gradients (n, rows, columns) as a piece (rows, n, columns), masked."""
        masked = gradients if self.mask is None else gradients * self.mask
        return masked.transpose(0, 1).contiguous()

    @abstractmethod
    def run(self, pieces: Iterable[Tensor], state: SolverState) -> Iterator[SolverState]:
        """Continue from `state` and yield states until all units are done.

        A run resumed from a yielded state reaches the bits of an undisturbed one.

        Args:
            pieces: gradients from `prepare`; iterated as often as necessary.
            state: to resume from; at the beginning one with `done=0` and a warm start.
        """


def total(
    pieces: Iterable[Tensor], moments: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Return the float64 sums over all pieces of statistics such as those of `fishleg.moments`.

    Args:
        pieces: at least one, (rows, n, columns).
        moments: maps gradients (n, rows, columns) to sums over n.
    """
    sums: tuple[Tensor, ...] = ()
    for piece in pieces:
        parts = [part.double() for part in moments(piece.transpose(0, 1))]
        sums = tuple(map(torch.add, sums, parts)) if sums else tuple(parts)
    return sums
