"""Adam's descent in the free numbers of one group's block, for any loss.

The free numbers are changes relative to the start: a factor T_0 becomes (I + X) T_0 (I + X)^T,
which is R^T R with R = T_0^1/2 (I + X)^T and so stays symmetric positive definite; positive numbers
(a scale, a diagonal) become t_0 exp(x). All of them start at zero, and one learning rate fits all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock

Tensors = dict[str, Tensor]
Loss = Callable[[AbstractBlock], Tensor]

_POSITIVE = frozenset({"scale", "bias", "values"})  # tensors of positive numbers, not factors
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.99, 1e-30


@dataclass(frozen=True, kw_only=True)
class Descent:
    """The state of a descent: the block is `assemble(start, free)`.

    Attributes:
        start: the block at zero.
        free: lambda: tensor name -> change.
        first: Adam's running mean of the slopes, likewise.
        second: Adam's running mean of their squares.
    """

    start: AbstractBlock
    free: Tensors
    first: Tensors
    second: Tensors

    @classmethod
    def begin(cls, start: AbstractBlock) -> Descent:
        """Return the state before the first step."""
        zeros = zeros_like(start.tensors())
        return cls(start=start, free=zeros, first=zeros, second=zeros)

    def block(self) -> AbstractBlock:
        """Return the block so far."""
        return assemble(self.start, self.free)

    def slopes(self, loss: Loss) -> Tensors:
        """Return the gradient of a loss of the block with respect to the free numbers."""
        free = {name: x.clone().requires_grad_() for name, x in self.free.items()}
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss(assemble(self.start, free)), list(free.values()))
        # strides, which change bits, are not saved
        return {name: slope.contiguous() for name, slope in zip(free, slopes, strict=True)}

    def step(self, slopes: Tensors, rate: float, age: int) -> Descent:
        """Return the state after a step of Adam.

        Args:
            slopes: from `slopes`.
            rate: relative size of the step.
            age: steps since the moments began, >= 0.
        """
        moved, first, second = {}, {}, {}
        for name, x in self.free.items():
            first[name], second[name], change = adam_change(
                name, slopes[name], self.first[name], self.second[name], age
            )
            moved[name] = x + rate * change
        return Descent(start=self.start, free=moved, first=first, second=second)

    def tensors(self) -> Tensors:
        """Return all tensors, under names that `restore` knows."""
        parts = {"start": self.start.tensors(), "free": self.free}
        parts |= {"first": self.first, "second": self.second}
        return {f"{part}.{name}": x for part, found in parts.items() for name, x in found.items()}

    @classmethod
    def restore(
        cls, kind: type[AbstractBlock], shape: tuple[int, int], tensors: Tensors
    ) -> Descent:
        """Undo `tensors`; names of other parts are ignored."""

        def part(of: str) -> Tensors:
            prefix = f"{of}."
            return {
                name.removeprefix(prefix): x
                for name, x in tensors.items()
                if name.startswith(prefix)
            }

        start = kind.restore(part("start"), shape)
        return cls(start=start, free=part("free"), first=part("first"), second=part("second"))


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


def assemble(start: AbstractBlock, free: Mapping[str, Tensor]) -> AbstractBlock:
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


def scale_block(block: AbstractBlock, scale: Tensor | float) -> AbstractBlock:
    """Return a Q for a scalar a > 0; every block is linear in its first tensor."""
    tensors = block.tensors()
    linear = next(iter(tensors))
    tensors[linear] = tensors[linear] * scale
    return type(block).restore(tensors, block.shape)


def zeros_like(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors of zeros, of the same names and shapes."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
