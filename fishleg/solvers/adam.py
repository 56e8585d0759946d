"""Adam on the FishLeg objective, for blocks of any structure.

`descent` has the free numbers and Adam's step.

Plain steps follow the gradient of J, (d(Qu)/dx)^T (F_g Q u - u). Preconditioned steps put Q, held
constant, before the residual: quicker on stiff problems, but no gradient of a function; inside a
restricted family they have another fixed point. So they come first and plain ones last, and J on
all the data decides after each phase whether its result is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import cos, log, pi
from typing import NamedTuple

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.objective import (
    curvature_and_trace,
    expected_objective,
    gradient_product,
    image_energy,
    log_det_objective,
    masked_product,
    probe_objective,
)
from fishleg.options import FishLegOptions
from fishleg.rng import SampleGenerator
from fishleg.solvers.base import AbstractSolver, SolverState
from fishleg.solvers.descent import Descent, Tensors, scale_block, zeros_like

_STEPS_A_YIELD = 10


class AdamSolver(AbstractSolver):
    """Descends on J, or J_M, with one piece of the data a step (a step is a unit of work).

    The warm start is first brought to its best scale. A state's `numbers`: `objective`, J on all
    the data at the beginning of the running phase; `rejected`, phases that did not lower J and
    were undone; `pieces`, the length of a pass. Its `extra`: the start, the free numbers, those at
    the beginning of the phase, and Adam's moments.

    Cost: about three products with Q for each gradient of a step's piece, and one for each gradient
    of all pieces at the beginning and at the end of each phase.

    Args:
        damping: gamma > 0.
        options: of the objective and the steps, whose learning rate falls to 0 along a cosine over
            the plain steps.
        gradients: number of gradients in all pieces.
        steps: in all, preconditioned ones included.
        mask: survivors, bool (rows, columns), at least one; None keeps all.
        restrict: whether Q means M o Q o M, so that J_M is minimised; otherwise only the
            gradients are masked, which acts as a stronger damping.
    """

    def __init__(
        self,
        damping: float,
        options: FishLegOptions,
        gradients: int,
        steps: int,
        mask: Tensor | None = None,
        *,
        restrict: bool = False,
    ):
        super().__init__(damping, mask)
        self.options = options
        self.units = steps
        self._gradients = gradients
        self._support = mask if restrict else None

    def run(self, pieces: Iterable[Tensor], state: SolverState) -> Iterator[SolverState]:
        """Yield the state every few steps and after each phase."""
        now = _Run.load(state) if state.extra else self._begin(pieces, state.block)
        for begin, end in (
            (0, self.options.preconditioned_steps),
            (self.options.preconditioned_steps, self.units),
        ):
            if now.step >= end:
                continue
            for piece in _cycle(pieces, (now.step - begin) % now.pieces, end - now.step):
                now = self._step(now, piece.transpose(0, 1), now.step - begin)
                if now.step % _STEPS_A_YIELD == 0 and now.step < end:
                    yield now.save()
            now = self._end_phase(pieces, now)
            yield now.save()

    def _begin(self, pieces: Iterable[Tensor], block: AbstractBlock) -> _Run:
        """Return the state before the first step, at the warm start's best scale."""
        found = self._measure(pieces, block)
        descent = Descent.begin(scale_block(block, found.best_scale))
        return _Run(
            descent=descent,
            anchor=descent.free,
            step=0,
            pieces=found.pieces,
            objective=found.rescaled,
            rejected=0,
        )

    def _step(self, now: _Run, gradients: Tensor, age: int) -> _Run:
        """Return the state after one step on a piece; `age` counts steps of the phase."""
        weight = (self._gradients / len(gradients)) ** 0.5
        slopes = now.descent.slopes(lambda block: self._loss(block, weight * gradients, now.step))
        rate = self.options.learning_rate
        if now.step >= self.options.preconditioned_steps:
            rate *= 0.5 + 0.5 * cos(pi * age / (self.units - self.options.preconditioned_steps))
        return replace(now, step=now.step + 1, descent=now.descent.step(slopes, rate, age))

    def _loss(self, block: AbstractBlock, gradients: Tensor, step: int) -> Tensor:
        """Return the scalar whose gradient the step follows."""
        options = self.options
        plain = step >= options.preconditioned_steps
        if options.objective == "log_det":
            return log_det_objective(block, gradients, self.damping)
        if plain and options.objective == "expected":
            return expected_objective(block, gradients, self.damping, self._support)
        numbers = torch.arange(options.probes, device=gradients.device)
        generator = SampleGenerator(options.seed, numbers, step)
        probes = generator.normal(*block.shape).to(gradients.dtype)
        if not plain:
            return preconditioned_loss(block, probes, gradients, self.damping, self._support)
        return probe_objective(
            block, probes, lambda v: gradient_product(gradients, v), self.damping, self._support
        )

    def _end_phase(self, pieces: Iterable[Tensor], now: _Run) -> _Run:
        """End a phase: keep its result if the objective fell, else restore its beginning."""
        objective = self._measure(pieces, now.descent.block()).objective
        descent = now.descent
        zeros = zeros_like(descent.free)
        if objective < now.objective:
            now = replace(now, objective=objective, anchor=descent.free)
        else:  # or it is not a number
            now = replace(now, rejected=now.rejected + 1)
            descent = replace(descent, free=now.anchor)
        return replace(now, descent=replace(descent, first=zeros, second=zeros))

    def _measure(self, pieces: Iterable[Tensor], block: AbstractBlock) -> _Measured:
        """Return the block's objective on all the data."""
        count = 0

        def gradients() -> Iterator[Tensor]:
            nonlocal count
            for piece in pieces:
                count += 1
                yield piece.transpose(0, 1)

        if self.options.objective == "log_det":
            energies = sum(float(image_energy(block, one)) for one in gradients())
            energy = energies + self.damping * float(block.trace())
            size, log_det = block.shape[0] * block.shape[1], float(block.log_det())
            scale = size / energy
            rescaled = size - log_det - size * log(scale)
            return _Measured(energy - log_det, scale, rescaled, count)
        curvature, trace = map(
            float, curvature_and_trace(block, gradients(), self.damping, self._support)
        )
        rescaled = -0.5 * trace**2 / curvature
        return _Measured(0.5 * curvature - trace, trace / curvature, rescaled, count)


class _Measured(NamedTuple):
    """A block on all the data: its objective, its best scale, the objective there, the pieces."""

    objective: float
    best_scale: float
    rescaled: float
    pieces: int


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The state of a run; see `AdamSolver`."""

    descent: Descent
    anchor: Tensors
    step: int
    pieces: int
    objective: float
    rejected: int

    def save(self) -> SolverState:
        """Return the state that a solver yields."""
        anchor = {f"anchor.{name}": x for name, x in self.anchor.items()}
        numbers = {
            "objective": self.objective,
            "rejected": self.rejected,
            "pieces": self.pieces,
        }
        extra = self.descent.tensors() | anchor
        return SolverState(block=self.descent.block(), done=self.step, extra=extra, numbers=numbers)

    @classmethod
    def load(cls, state: SolverState) -> _Run:
        """Undo `save`."""
        return cls(
            descent=Descent.restore(type(state.block), state.block.shape, state.extra),
            anchor={name: state.extra[f"anchor.{name}"] for name in state.block.tensors()},
            step=state.done,
            pieces=int(state.numbers["pieces"]),
            objective=state.numbers["objective"],
            rejected=int(state.numbers["rejected"]),
        )


def preconditioned_loss(
    block: AbstractBlock,
    probes: Tensor,
    gradients: Tensor,
    damping: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Return a scalar whose gradient is (d(Qu)/dx)^T Q (F_g Q u - u), averaged over the probes u.

    Its value has no meaning: the residual, and Q before it, are held constant.

    Args:
        block: Q, differentiable in x.
        probes: u, (p, rows, columns), standard normal.
        gradients: scaled, (n, rows, columns).
        damping: gamma > 0.
        mask: survivors, bool (rows, columns); None keeps all.
    """
    image = masked_product(block, probes, mask)
    with torch.no_grad():
        residual = gradient_product(gradients, image) + damping * image - probes
        direction = masked_product(block, residual, mask)
    return (image * direction).sum() / len(probes)


def _cycle(pieces: Iterable[Tensor], first: int, count: int) -> Iterator[Tensor]:
    """Yield `count` pieces, in rounds, from number `first` on."""
    while count > 0:
        for piece in islice(pieces, first, first + count):
            yield piece
            count -= 1
        first = 0
