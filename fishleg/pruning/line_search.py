"""Line searches after a refinement, of its path and of the norms, by held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishleg.calling import PLAIN, Calling
from fishleg.pruning.norms import reestimate_norms, running_norms

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class RefinementReport:
    """The result of a refinement.

    Attributes:
        kept: the fraction of its path that is kept, in [0, 1]; 1 where nothing was held out.
        begin: D at the beginning, in nats.
        end: D at the end of the path, on the same samples.
        divergence: D at the point kept, on the same samples.
        held_out: whether the samples were held out of the run.
    """

    kept: float
    begin: float
    end: float
    divergence: float
    held_out: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user, a sentence each."""
        path = f"{self.begin:.3g} nats before, {self.end:.3g} after all steps"
        if self.kept == 0.0:
            return (
                "Nothing of the refinement is kept: on held-out samples the divergence from the "
                f"dense network was least without it ({path}); lower learning_rate, or refine on "
                "more samples.",
            )
        if not self.divergence <= self.begin:
            return (
                f"The refinement ended further from the dense network than it began ({path}); "
                "lower learning_rate, or take more steps.",
            )
        return ()


@torch.no_grad()
def search_line(
    model: nn.Module,
    before: Mapping[str, Tensor],
    divergence: Callable[[nn.Module], float],
    fractions: Sequence[float] = FRACTIONS,
) -> RefinementReport:
    """Move a model back along the straight line to its former state, to the best point on it.

        w(a) = (1 - a) before + a after,   a = argmin over `fractions` of D(w(a)),

    for weights and running statistics; zeros of both ends stay 0. A refinement lowers the
    divergence on its own samples, and less on others; where pruning did little damage, its steps
    may do more harm than good. With a = 0 among the fractions the result is never worse on the
    samples of D than the model before the refinement.

    Args:
        model: at the end of the run; moved in place.
        before: a copy of the model's state dict at the beginning.
        divergence: D of a model, on samples held out of the run.
        fractions: tried in this order, each in [0, 1], 0 and 1 among them; the first of equals
            wins.

    Returns:
        The fraction taken, and D at both ends and at that point.

    Raises:
        ValueError: 0 or 1 is not among the fractions.

    Cost: an evaluation of D each. Memory: two copies of the state.
    """
    if not {0.0, 1.0} <= set(fractions):
        raise ValueError(f"fractions: expected 0 and 1 among them, got {tuple(fractions)}.")
    after = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    for fraction in fractions:
        _place(model, before, after, fraction)
        found[fraction] = divergence(model)
    best = min(found, key=found.__getitem__)
    _place(model, before, after, best)
    return RefinementReport(
        kept=best, begin=found[0.0], end=found[1.0], divergence=found[best], held_out=True
    )


def search_norms(
    model: nn.Module,
    batches: Iterable[Any],
    divergence: Callable[[nn.Module], float],
    fractions: Sequence[float] = FRACTIONS,
    calling: Calling = PLAIN,
) -> float:
    """Move the batch norms towards their statistics over `batches`, to the best point on the line.

    The running statistics of a training or refinement follow augmented inputs, whose moments are
    others than those of the inputs themselves; weights may be adapted to either.

    Args:
        model: moved in place; one without batch norms stays as it is.
        batches: of inputs that are not augmented, as `reestimate_norms` takes them.
        divergence: D of a model, on samples held out of the run.
        fractions: as `search_line` takes them.
        calling: how the model is called.

    Returns:
        The fraction of the line that is kept: 0 for the former statistics, 1 for those over
        `batches`. Errors are those of `reestimate_norms` and `search_line`.

    Cost: a forward pass over `batches`, and an evaluation of D each.
    """
    if not running_norms(model):
        return 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_norms(model, batches, calling)
    return search_line(model, before, divergence, fractions).kept


def _place(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], fraction: float
) -> None:
    for name, value in model.state_dict().items():
        if fraction in (0.0, 1.0) or not value.is_floating_point():
            value.copy_(before[name] if fraction == 0.0 else after[name])
        else:
            value.copy_(torch.lerp(before[name], after[name], fraction))
