"""Running sums of one pass over the data; resumable, bit-identical."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fishleg.errors import FishLegError
from fishleg.gradients import GradientSource
from fishleg.loading import checksum
from fishleg.team import Team

MEETINGS = 8  # of a team in a pass, about: what it may lose is the share between two of them
Progress = Callable[[int], None]
Sums = dict[str, list[Tensor]]


class Add(Protocol):
    """Adds to the sums what a batch gives, and returns how many gradient rows it has."""

    def __call__(self, sums: Sums, batch: Mapping[str, Any], first_row: int) -> int:
        """Add a batch, whose first row has the number `first_row` in the whole pass."""


@dataclass
class Tally:
    """How far a pass over the data is, and its sums.

    The members of a team add up their parts of the data, and meet a few times in a pass, always
    after the same batches, to put their sums together: the bits depend on the size of the team, but
    not on where a pass was interrupted. A tally is as of the last meeting, the same on all. Parts
    belong to a number of processes: another number begins the pass again.

    Attributes:
        rounds: batches that each process has done.
        processes: how many there are.
        whole: whether the pass is at its end; it is not begun again then.
        sums: group name -> sums over the batches, of all processes.
    """

    rounds: int = 0
    processes: int = 1
    whole: bool = False
    sums: Sums = field(default_factory=dict)

    def run(
        self,
        source: GradientSource,
        stream: Callable[[GradientSource], Iterator[Mapping[str, Any]]],
        add: Add,
        progress: Progress | None = None,
    ) -> None:
        """Go on to the end of the pass.

        Memory: in a team the sums are there twice.

        Args:
            source: of the data; a team shares the pass.
            stream: yields the batches of a source.
            add: adds one of them.
            progress: told the gradient rows done so far; may take a copy of the tally.

        A FishLegError if the processes of a team have not the same samples.
        """
        if self.whole:
            return
        team, part = source.team, source.shared()
        if team.size > 1:
            _check_samples(source)
        if self.processes != team.size:
            self.rounds, self.processes = 0, team.size
            self.sums.clear()
        rest = part.after(self.rounds)
        batches, row = stream(rest), rest.first_row
        own = self.sums
        if team.size > 1:  # alone, what is added is at once what all have
            own = {n: [torch.zeros_like(one) for one in sums] for n, sums in self.sums.items()}
        last = source.longest_part
        every = 1 if team.size == 1 else -(-last // MEETINGS)
        for rounds in range(self.rounds + 1, last + 1):
            batch = next(batches, None)  # the parts differ by a sample, and so perhaps by a batch
            if batch is not None:
                row += add(own, batch, row)
            if rounds % every == 0 or rounds == last:
                if team.size > 1:
                    _meet(team, own, self.sums)
                self.rounds = rounds
            if progress is not None:
                progress(min((row - part.first_row) * team.size, source.rows))
        _check_finite(source, stream, self.sums)
        self.whole = True


def _check_samples(source: GradientSource) -> None:
    """Check that all processes of a team have the same samples, by number and first batch.

    Each takes a part of its own: of a loader that each has shuffled by itself, the parts would
    neither be all samples nor different ones.

    Raises:
        FishLegError: they have not; in all processes alike.
    """
    batch = next(source.batches())
    mine = [len(source.calibration), checksum((batch.inputs, batch.targets, batch.indices))]
    _, first = source.team.share({}, mine)
    if source.team.any(mine != first):
        raise FishLegError(
            "Calibration samples: expected the same ones in the same order in all processes, got "
            "others in some; seed a loader that shuffles or augments alike in each of them."
        )


def _check_finite(
    source: GradientSource,
    stream: Callable[[GradientSource], Iterator[Mapping[str, Any]]],
    sums: Sums,
) -> None:
    """Check the sums of a pass, and go through it once more if one is spoilt.

    Raises:
        FishLegError: a sum is not finite; with the sample that is to blame, if one alone is.
    """
    wrong = [n for n, parts in sums.items() if not all(bool(x.isfinite().all()) for x in parts)]
    if not wrong:
        return
    for _ in stream(source.thorough().shared()):
        pass
    raise FishLegError(
        f"{', '.join(wrong)}: expected finite sums over the gradients, got others, though what "
        "each sample's are made of is finite: they overflow. Scale the inputs or the loss down, or "
        "use float64."
    )


def _meet(team: Team, own: Sums, common: Sums) -> None:
    """Move what each process has summed into the sums of all."""
    team.sum(tensor for sums in own.values() for tensor in sums)
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
