"""The gradients of a pack of groups, as solvers take them: held, or streamed again each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from fishleg.gradients.running_sums import Progress
from fishleg.gradients.source import GradientSource
from fishleg.solvers.base import AbstractSolver


class StreamedPieces:
    """The pieces of one group; each iteration over them is a pass of the data.

    Args:
        source: of the gradients.
        name: of the group.
        solver: prepares the pieces.
    """

    def __init__(self, source: GradientSource, name: str, solver: AbstractSolver):
        self._source = source
        self._name = name
        self._solver = solver

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._source.stream([self._name]):
            yield self._solver.prepare(batch[self._name])


def gather_pieces(
    source: GradientSource,
    pack: Sequence[str],
    solvers: Mapping[str, AbstractSolver],
    names: Sequence[str],
    held: bool,
    progress: Progress,
) -> dict[str, Iterable[Tensor]]:
    """Return group name -> pieces (rows, n, columns), of some groups of a pack.

    Args:
        source: of the gradients.
        pack: all groups of the pack; streaming all of them makes a resumed fit bit-identical.
        solvers: group name -> solver, which prepares its pieces.
        names: the groups wanted.
        held: whether the pieces are held in memory.
        progress: is given the gradient rows held so far.
    """
    if not held:
        return {name: StreamedPieces(source, name, solvers[name]) for name in names}
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}
    rows = 0
    for batch in source.stream(pack):
        for name in names:
            gradients = batch[name]
            pieces[name].append(solvers[name].prepare(gradients))
        rows += len(gradients)
        progress(rows)
    return dict(pieces)
