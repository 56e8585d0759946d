"""Adam on the FishLeg objective, for blocks of any structure.

The free numbers are changes relative to the start: a factor T_0 becomes (I + X) T_0 (I + X)^T,
which is R^T R with R = T_0^1/2 (I + X)^T and so stays symmetric positive definite; positive numbers
(a scale, a diagonal) become t_0 exp(x). All of them start at zero, and one learning rate fits all.

Plain steps follow the gradient of J, (d(Qu)/dx)^T (F_g Q u - u). Preconditioned steps put Q, held
constant, before the residual: quicker on stiff problems, but no gradient of a function; inside a
restricted family they have another fixed point. So they come first and plain ones last, and J on
all the data decides after each phase whether its result is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import cos, pi

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.objective import (
    curvature_and_trace,
    expected_objective,
    gradient_product,
    masked_product,
    probe_objective,
)
from fishleg.options import FishLegOptions
from fishleg.rng import SampleGenerator
from fishleg.solvers.base import AbstractSolver, SolverState

Tensors = dict[str, Tensor]

_POSITIVE = frozenset({"scale", "bias", "values"})  # tensors of positive numbers, not factors
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.99, 1e-30
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
        now = _Descent.load(state) if state.extra else self._begin(pieces, state.block)
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

    def _begin(self, pieces: Iterable[Tensor], block: AbstractBlock) -> _Descent:
        """Return the state before the first step, at the warm start's best scale."""
        curvature, trace, count = self._measure(pieces, block)
        tensors = block.tensors()
        linear = next(iter(tensors))  # Q is linear in its first tensor
        tensors[linear] = tensors[linear] * (trace / curvature)
        zeros = _zeros(tensors)
        return _Descent(
            start=type(block).restore(tensors, block.shape),
            step=0,
            pieces=count,
            objective=-0.5 * trace**2 / curvature,
            rejected=0,
            free=zeros,
            anchor=zeros,
            first=zeros,
            second=zeros,
        )

    def _step(self, now: _Descent, gradients: Tensor, age: int) -> _Descent:
        """Return the state after one step on a piece; `age` counts steps of the phase."""
        weight = (self._gradients / len(gradients)) ** 0.5
        free = {name: x.clone().requires_grad_() for name, x in now.free.items()}
        loss = self._loss(assemble(now.start, free), weight * gradients, now.step)
        slopes = torch.autograd.grad(loss, list(free.values()))
        rate = self.options.learning_rate
        if now.step >= self.options.preconditioned_steps:
            rate *= 0.5 + 0.5 * cos(pi * age / (self.units - self.options.preconditioned_steps))
        moved, first, second = {}, {}, {}
        for (name, x), slope in zip(now.free.items(), slopes, strict=True):
            first[name], second[name], change = adam_change(
                name, slope, now.first[name], now.second[name], age
            )
            moved[name] = x + rate * change
        return replace(now, step=now.step + 1, free=moved, first=first, second=second)

    def _loss(self, block: AbstractBlock, gradients: Tensor, step: int) -> Tensor:
        """Return the scalar whose gradient the step follows."""
        options = self.options
        plain = step >= options.preconditioned_steps
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

    def _end_phase(self, pieces: Iterable[Tensor], now: _Descent) -> _Descent:
        """End a phase: keep its result if J fell, else restore its beginning."""
        curvature, trace, _ = self._measure(pieces, now.block())
        objective = 0.5 * curvature - trace
        zeros = _zeros(now.free)
        if objective < now.objective:
            now = replace(now, objective=objective, anchor=now.free)
        else:  # or J is not a number
            now = replace(now, rejected=now.rejected + 1, free=now.anchor)
        return replace(now, first=zeros, second=zeros)

    def _measure(self, pieces: Iterable[Tensor], block: AbstractBlock) -> tuple[float, float, int]:
        """Return tr(Q F_g Q), tr Q and the number of pieces."""
        count = 0

        def gradients() -> Iterator[Tensor]:
            nonlocal count
            for piece in pieces:
                count += 1
                yield piece.transpose(0, 1)

        curvature, trace = curvature_and_trace(block, gradients(), self.damping, self._support)
        return float(curvature), float(trace), count


@dataclass(frozen=True, kw_only=True)
class _Descent:
    """The state of a descent; see `AdamSolver`."""

    start: AbstractBlock
    step: int
    pieces: int
    objective: float
    rejected: int
    free: Tensors
    anchor: Tensors
    first: Tensors
    second: Tensors

    def block(self) -> AbstractBlock:
        """Return Q so far."""
        return assemble(self.start, self.free)

    def save(self) -> SolverState:
        """Return the state that a solver yields."""
        extra = {f"start.{name}": tensor for name, tensor in self.start.tensors().items()}
        for part in _PARTS:
            extra |= {f"{part}.{name}": x for name, x in getattr(self, part).items()}
        numbers = {
            "objective": self.objective,
            "rejected": self.rejected,
            "pieces": self.pieces,
        }
        return SolverState(block=self.block(), done=self.step, extra=extra, numbers=numbers)

    @classmethod
    def load(cls, state: SolverState) -> _Descent:
        """Undo `save`."""
        names = state.block.tensors()
        start = {name: state.extra[f"start.{name}"] for name in names}
        parts = {part: {name: state.extra[f"{part}.{name}"] for name in names} for part in _PARTS}
        return cls(
            start=type(state.block).restore(start, state.block.shape),
            step=state.done,
            pieces=int(state.numbers["pieces"]),
            objective=state.numbers["objective"],
            rejected=int(state.numbers["rejected"]),
            **parts,
        )


_PARTS = ("free", "anchor", "first", "second")


def adam_change(
    name: str, slope: Tensor, first: Tensor, second: Tensor, age: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Adam's next moments of one tensor, and the change x wants at a learning rate of 1.

    Args:
        name: of the tensor; distinguishes factors from positive numbers.
        slope: dJ/dx.
        first: running mean of the slopes, of their shape.
        second: running mean of their squares.
        age: steps taken before, >= 0.
    """
    slope = slope.contiguous()  # strides, which change bits, are not saved
    first = first.lerp(slope, 1 - _BETA_1)
    second = second.lerp(slope.square(), 1 - _BETA_2)
    mean = first / (1 - _BETA_1 ** (age + 1))
    spread = (second / (1 - _BETA_2 ** (age + 1))).sqrt()
    # a step of random signs in all entries changes a factor by about the learning rate
    size = 1.0 if name in _POSITIVE else slope.shape[-1] ** -0.5
    return first, second, -size * mean / (spread + _EPSILON)


def relative_slope(name: str, tensor: Tensor, slope: Tensor) -> Tensor:
    """Return dJ/dy at y = 0, where T moves to (I + Y) T (I + Y)^T, or t to t exp(y).

        (S + S^T) T,   or   s o t

    Args:
        name: of the tensor; distinguishes factors from positive numbers.
        tensor: T, symmetric, or t.
        slope: S = dJ/dT, or s = dJ/dt.
    """
    return slope * tensor if name in _POSITIVE else (slope + slope.mT) @ tensor


def compose(name: str, free: Tensor, change: Tensor) -> Tensor:
    """Return the x that `assemble` needs after the move y, from the x before: I + X is a product.

    I + X  <-  (I + Y)(I + X),   or   x  <-  x + y
    """
    return free + change if name in _POSITIVE else free + change + change @ free


def assemble(start: AbstractBlock, free: Tensors) -> AbstractBlock:
    """Return the block that lies x = `free` away from the start, in the start's structure."""
    tensors = {}
    for name, tensor in start.tensors().items():
        if name in _POSITIVE:
            tensors[name] = tensor * free[name].exp()
        else:
            eye = torch.eye(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
            root = eye + free[name]
            tensors[name] = root @ tensor @ root.mT
    return type(start).restore(tensors, start.shape)


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


def _zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
