"""Classes, at any number of positions a sample."""

from __future__ import annotations

from copy import copy
from math import prod
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from fishleg.checks import check_integer
from fishleg.errors import CapacityExceeded, FishLegError, ShapeMismatch
from fishleg.likelihoods.base import AbstractLikelihood
from fishleg.memory import available_bytes, show_bytes
from fishleg.precision import widen
from fishleg.rng import SampleGenerator

_NO_TARGET = -100  # as in torch.nn.functional.cross_entropy


class Categorical(AbstractLikelihood):
    """Classes with logits: p = softmax(f), H = diag(p) - p p^T, at each position by itself.

    Outputs are (n, C), or have positions as well: tokens (n, T, C), pixels (n, C, H, W) with
    `class_dim=1`. The loss is the sum over a sample's positions, which given the outputs are
    independent, so that H is block-diagonal. Targets are class numbers in the outputs' shape
    without the classes, (n) or (n, T) or (n, H, W); or weights of the classes of sum 1, floating
    point, in the outputs' shape. A logit of -inf excludes a class.

    Args:
        class_dim: the outputs' dimension that counts classes. By default the last one; outputs of
            four or more dimensions need it given.
        ignore_index: positions whose class number is this one, such as padding, count nothing,
            with drawn labels too, which then need the samples' targets. None: all positions count.

    Raises:
        ValueError: `class_dim` is the samples' dimension.
    """

    def __init__(self, *, class_dim: int | None = None, ignore_index: int | None = None):
        for name, value in (("class_dim", class_dim), ("ignore_index", ignore_index)):
            if value is not None:
                check_integer(name, value)
        if class_dim == 0:
            raise ValueError("class_dim: expected 1, 2, ... or -1, got 0, which counts samples.")
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        self._counts: Tensor | None = None

    def __repr__(self) -> str:
        given = {"class_dim": self.class_dim, "ignore_index": self.ignore_index}
        shown = (f"{name}={value}" for name, value in given.items() if value is not None)
        return f"Categorical({', '.join(shown)})"

    def given(self, targets: Tensor | None) -> Self:
        """Return the likelihood for samples with these targets, of which some positions count.

        Args:
            targets: class numbers (n, ...).

        Raises:
            FishLegError: positions are to be ignored, and there are no class numbers.
        """
        if self.ignore_index is None:
            return self
        if targets is None or targets.is_floating_point():
            got = "none" if targets is None else f"{targets.dtype} ones"
            raise FishLegError(
                f"ignore_index={self.ignore_index}: which positions count is written in the "
                f"targets, expected class numbers, got {got}; give the calibration samples their "
                "targets, or leave ignore_index out, and all positions count."
            )
        bound = copy(self)
        bound._counts = targets != self.ignore_index
        return bound

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return sum_t log sum_c exp f_tc - f_ty for each sample, (n,).

        Averaged over weighted classes. Ignored targets count nothing, and so does a
        position all of whose weights are 0.

        Raises:
            ShapeMismatch: targets do not go with outputs.
        """
        logits = self._classes_last(widen(outputs)).movedim(-1, 1)
        shape = (len(logits), *logits.shape[2:])
        if targets.is_floating_point():
            if targets.shape != outputs.shape:
                raise ShapeMismatch(
                    f"targets: expected class numbers of shape {shape}, as integers, or weights "
                    f"of shape {tuple(outputs.shape)}, floating point; got {targets.dtype} "
                    f"{tuple(targets.shape)}."
                )
            weights = self._classes_last(targets).movedim(-1, 1)
            # an excluded class has -inf, and weight 0
            logs = logits.log_softmax(1).where(weights != 0, 0)
            losses = -(logs * weights).sum(1)
        else:
            if targets.shape != shape:
                raise ShapeMismatch(
                    f"targets: expected class numbers of shape {shape} for outputs "
                    f"{tuple(outputs.shape)}, got {tuple(targets.shape)}; give class_dim, the "
                    "dimension of the outputs that counts classes."
                )
            ignored = _NO_TARGET if self.ignore_index is None else self.ignore_index
            losses = functional.cross_entropy(
                logits, targets.long(), reduction="none", ignore_index=ignored
            )
        return _over_positions(losses)

    def sample(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return class numbers drawn from softmax(outputs), by inversion of the distribution."""
        logits = self._classes_last(outputs.detach())
        cumulative = logits.double().softmax(-1).cumsum(-1)
        below = (cumulative < generator.uniform(*logits.shape[1:-1], 1)).sum(-1)
        # The last sum may fall short of 1 by rounding.
        drawn = below.clamp_(max=logits.shape[-1] - 1)
        counts = self._counted(logits)
        if counts is None:
            return drawn
        return self._as_targets(drawn.masked_fill_(~counts, _NO_TARGET), logits)

    def match(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return weights of the classes with the mean and covariance of one-hot labels.

        y = p - sqrt(p) o e + p (sqrt(p) . e), e random signs: then l' = p - y has the covariance
        (diag(sqrt p) - p sqrt(p)^T)(...)^T = diag(p) - p p^T = H. A confident network's sampled
        labels nearly always agree with it and give no gradient, except for a rare large one; here
        every sample gives one of typical size, so fewer samples estimate F as well.
        """
        logits = self._classes_last(widen(outputs.detach()))
        p = logits.double().softmax(-1)
        signs = torch.where(generator.uniform(*p.shape[1:]) < 0.5, -1.0, 1.0)
        noise = p.sqrt() * signs
        weights = (p - noise + p * noise.sum(-1, keepdim=True)).to(logits.dtype)
        return self._as_outputs(self._restrict(weights))

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return p o v - p (p . v) at each position, in the outputs' shape."""
        p = self._classes_last(widen(outputs)).softmax(-1)
        v = self._classes_last(v)
        return self._as_outputs(self._restrict(p * (v - (p * v).sum(-1, keepdim=True))))

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return sum_tc p_tc (log p_tc - log q_tc), (n,), with p = softmax(reference)."""
        wanted = self._classes_last(widen(reference)).log_softmax(-1)
        found = self._classes_last(widen(outputs)).log_softmax(-1)
        p = wanted.exp()
        return _over_positions(self._restrict(p * (wanted - found).where(p > 0, 0)).sum(-1))

    def enumerate(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return all classes of all positions, T C batches of targets, and their probabilities.

        Given the outputs positions are independent, and H has a block diag(p_t) - p_t p_t^T for
        each. So each target has a class at one position, and none at the others; for each position
        the weights sum to 1, or to 0 where it does not count. Labels without weight have no target.

        Raises:
            CapacityExceeded: they would exceed the free memory.
        """
        logits = self._classes_last(widen(outputs.detach()))
        n, *positions, classes = logits.shape
        weights = self._restrict(logits.softmax(-1)).reshape(n, -1)
        numbers = torch.arange(classes, device=logits.device)
        if not positions:
            targets = torch.where(weights.mT > 0, numbers[:, None], _NO_TARGET)
            return self._as_targets(targets, logits), weights
        count = prod(positions)
        needed, room = 8 * n * count * count * classes, available_bytes(logits.device)
        needed *= classes if self._is_class(classes) else 1
        if room is not None and needed > room:
            raise CapacityExceeded(
                f"Enumerated labels: {classes} classes at {count} positions take "
                f"{show_bytes(needed)} for {n} samples, and there are {show_bytes(room)}; use "
                "labels 'matched', or 'sampled'."
            )
        here = torch.eye(count, dtype=torch.bool, device=logits.device)[:, None, None, :]
        targets = torch.where(here, numbers[:, None, None], _NO_TARGET)
        targets = targets.expand(count, classes, n, count).reshape(-1, n, *positions)
        possible = (weights.mT > 0).reshape(-1, n, *[1] * len(positions))
        return self._as_targets(targets.where(possible, _NO_TARGET), logits), weights

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that class numbers are among the outputs' classes, and weights finite.

        Raises:
            FishLegError: one is not.
        """
        super().check_targets(outputs, targets)
        classes = self._classes_last(outputs).shape[-1]
        if targets.is_floating_point() or not targets.numel():
            return
        wrong = (targets < 0) | (targets >= classes)
        if self.ignore_index is not None:
            wrong &= targets != self.ignore_index
        if bool(wrong.any()):
            sample, *rest = wrong.nonzero()[0].tolist()
            where = f"sample {sample} of its batch" + (f", position {tuple(rest)}" if rest else "")
            number = targets[(sample, *rest)].item()
            raise FishLegError(
                f"targets: expected class numbers in [0, {classes}), got {number} ({where}); "
                "number the classes from 0, or give ignore_index, the number of "
                "positions that do not count."
            )

    # -- layout

    def _is_class(self, classes: int) -> bool:
        """Tell whether the ignored number is also that of a class, which may be drawn."""
        return self.ignore_index is not None and 0 <= self.ignore_index < classes

    def _as_targets(self, numbers: Tensor, logits: Tensor) -> Tensor:
        """Return drawn class numbers as `nll` takes them.

        As weights of the classes, where numbers could be confused with ignored ones.

        Args:
            numbers: (..., n, *positions), `_NO_TARGET` for none.
            logits: (n, *positions, C).
        """
        if self.ignore_index is None:
            return numbers
        none, classes = numbers == _NO_TARGET, logits.shape[-1]
        if not self._is_class(classes):
            return numbers.masked_fill(none, self.ignore_index)
        weights = functional.one_hot(numbers.clamp(min=0), classes).to(logits.dtype)
        weights = weights.masked_fill(none.unsqueeze(-1), 0)
        return self._as_outputs(weights, lead=numbers.ndim - logits.ndim + 1)

    def _dimension(self, outputs: Tensor) -> int:
        """Return the dimension that counts classes.

        Raises:
            ShapeMismatch: none does, or the choice is not given.
        """
        shape, dim = tuple(outputs.shape), self.class_dim
        if len(shape) < 2:
            raise ShapeMismatch(
                f"Categorical: expected outputs (samples, classes), got {shape}, one number a "
                "sample; take Bernoulli() for a yes or no."
            )
        if dim is None and len(shape) > 3:
            raise ShapeMismatch(
                f"Categorical: outputs {shape} have more dimensions than (samples, positions, "
                "classes); give the one of the classes: class_dim=1 for images, -1 for the last."
            )
        dim = -1 if dim is None else dim
        if not -len(shape) < dim < len(shape):
            raise ShapeMismatch(f"class_dim: outputs {shape} have no dimension {dim} of classes.")
        if shape[dim] < 2:
            raise ShapeMismatch(
                f"Categorical: expected at least two classes, got {shape[dim]}, in dimension "
                f"{dim} of outputs {shape}; take Bernoulli() for a yes or no."
            )
        return dim

    def _classes_last(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self._dimension(outputs), -1)

    def _as_outputs(self, values: Tensor, lead: int = 0) -> Tensor:
        """Undo `_classes_last`, behind `lead` further dimensions."""
        dim = -1 if self.class_dim is None else self.class_dim
        return values.movedim(-1, dim if dim < 0 else dim + lead)

    def _counted(self, logits: Tensor) -> Tensor | None:
        """Return the positions that count, bool (n, *positions), or None for all.

        Raises:
            FishLegError: the targets, which determine them, are not known.
            ShapeMismatch: the known targets belong to other outputs.
        """
        if self.ignore_index is None:
            return None
        if self._counts is None:
            raise FishLegError(
                f"ignore_index={self.ignore_index}: which positions count is written in the "
                "targets; bind them first, `likelihood.given(targets)`, or give batches with "
                "their targets."
            )
        if self._counts.shape != logits.shape[:-1]:
            raise ShapeMismatch(
                f"targets: expected class numbers of shape {tuple(logits.shape[:-1])}, got "
                f"{tuple(self._counts.shape)}."
            )
        return self._counts

    def _restrict(self, values: Tensor) -> Tensor:
        """Return values (n, *positions, C), 0 at positions that do not count."""
        counts = self._counted(values)
        return values if counts is None else values.where(counts.unsqueeze(-1), 0)


def _over_positions(values: Tensor) -> Tensor:
    """Return the sums (n,) of values (n, *positions)."""
    return values if values.ndim == 1 else values.flatten(1).sum(1)
