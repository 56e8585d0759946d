"""Running sums of one pass over the data; resumable, bit-identical."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fishleg.errors import FishLegError
from fishleg.gradients.rank_group import RankGroup
from fishleg.gradients.source import GradientSource
from fishleg.loading import checksum

REDUCTIONS = 8  # of a rank group in a pass, about; an interruption loses the work since the last
Progress = Callable[[int], None]
Sums = dict[str, list[Tensor]]


class Add(Protocol):
    """Adds the statistics of a batch to the sums, and returns the batch's gradient rows."""

    def __call__(self, sums: Sums, batch: Mapping[str, Any], first_row: int) -> int:
        """Add a batch, whose first row has the number `first_row` in the whole pass."""


@dataclass
class RunningSums:
    """The sums of a pass over the data, and how far the pass is.

    Each process of a rank group sums over its part of the data. A few times in a pass, always
    after the same batches, the processes add up their sums: the bits depend on the size of the
    rank group, and not on where a pass was interrupted. The state here is that of the last
    reduction, the same in all processes. Parts belong to a number of processes: with another
    number the pass starts over.

    Attributes:
        rounds: batches that each process has done.
        processes: their number.
        whole: whether the pass is complete; `run` then does nothing.
        sums: group name -> sums over the batches of all processes.
    """

    rounds: int = 0
    processes: int = 1
    whole: bool = False
    sums: Sums = field(default_factory=dict)

    def places(self) -> dict[str, Any]:
        """Return all but the tensors, as JSON."""
        counts = {name: len(parts) for name, parts in self.sums.items()}
        return {
            "rounds": self.rounds,
            "processes": self.processes,
            "whole": self.whole,
            "sums": counts,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums as GROUP/NUMBER -> tensor."""
        return {
            f"{name}/{number}": part
            for name, parts in self.sums.items()
            for number, part in enumerate(parts)
        }

    @classmethod
    def restore(cls, places: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RunningSums:
        """Undo `places` and `tensors`; other entries of both are ignored."""
        sums = {
            name: [tensors[f"{name}/{number}"].clone() for number in range(count)]
            for name, count in places["sums"].items()
        }
        own = {name: places[name] for name in ("rounds", "processes", "whole")}
        return cls(**own, sums=sums)

    def run(
        self,
        source: GradientSource,
        stream: Callable[[GradientSource], Iterator[Mapping[str, Any]]],
        add: Add,
        progress: Progress | None = None,
    ) -> None:
        """Complete the pass from its present state.

        Memory: each process of a rank group holds the sums twice.

        Args:
            source: of the data; a rank group shares the pass.
            stream: yields the batches of a source.
            add: adds a batch.
            progress: is given the gradient rows done so far; may copy this object.

        A FishLegError if the processes of a rank group do not have the same samples.
        """
        if self.whole:
            return
        ranks, part = source.rank_group, source.shared()
        if ranks.size > 1:
            _check_samples(source)
        if self.processes != ranks.size:
            self.rounds, self.processes = 0, ranks.size
            self.sums.clear()
        rest = part.after(self.rounds)
        batches, row = stream(rest), rest.first_row
        own = self.sums
        if ranks.size > 1:  # a single process adds to the common sums directly
            own = {n: [torch.zeros_like(one) for one in sums] for n, sums in self.sums.items()}
        last = source.longest_part
        every = 1 if ranks.size == 1 else -(-last // REDUCTIONS)
        for rounds in range(self.rounds + 1, last + 1):
            batch = next(batches, None)  # the parts differ by a sample, and so perhaps by a batch
            if batch is not None:
                row += add(own, batch, row)
            if rounds % every == 0 or rounds == last:
                if ranks.size > 1:
                    _reduce(ranks, own, self.sums)
                self.rounds = rounds
            if progress is not None:
                progress(min((row - part.first_row) * ranks.size, source.rows))
        _check_finite(source, stream, self.sums)
        self.whole = True


def _check_samples(source: GradientSource) -> None:
    """Check that all processes of a rank group have the same samples, by number and first batch.

    Each process takes its own part: of a loader that each process shuffles by itself, the parts
    would overlap and leave samples out.

    Raises:
        FishLegError: the samples differ; raised in all processes.
    """
    batch = next(source.batches())
    mine = [len(source.calibration), checksum((batch.inputs, batch.targets, batch.indices))]
    _, first = source.rank_group.broadcast({}, mine)
    if source.rank_group.any(mine != first):
        raise FishLegError(
            "Calibration samples: expected the same ones in the same order in all processes, got "
            "others in some; seed a loader that shuffles or augments alike in each of them."
        )


def _check_finite(
    source: GradientSource,
    stream: Callable[[GradientSource], Iterator[Mapping[str, Any]]],
    sums: Sums,
) -> None:
    """Check the sums of a pass; where one is not finite, repeat the pass to find the sample.

    Raises:
        FishLegError: a sum is not finite; names the sample, if one sample alone causes it.
    """
    wrong = [n for n, parts in sums.items() if not all(bool(x.isfinite().all()) for x in parts)]
    if not wrong:
        return
    for _ in stream(source.thorough().shared()):
        pass
    raise FishLegError(
        f"{', '.join(wrong)}: expected finite sums over the gradients, got others, though each "
        "sample's gradient is finite: the sums overflow. Scale the inputs or the loss down, or "
        "use float64."
    )


def _reduce(ranks: RankGroup, own: Sums, common: Sums) -> None:
    """Move the sums of each process into the common sums."""
    ranks.sum(tensor for sums in own.values() for tensor in sums)
    for name, sums in own.items():
        totals = common.setdefault(name, [torch.zeros_like(one) for one in sums])
        for total, one in zip(totals, sums, strict=True):
            total += one
            one.zero_()


def add_parts(sums: Sums, name: str, parts: tuple[Tensor, ...]) -> None:
    """Add a group's parts to its sums, which are float64."""
    if name not in sums:
        sums[name] = [torch.zeros_like(part, dtype=torch.float64) for part in parts]
    for total, part in zip(sums[name], parts, strict=True):
        total += part
