"""Settling: how far of the way that a run has gone is worth keeping, by samples it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class RefinementReport:
    """What a refinement has come to.

    Attributes:
        kept: the fraction of its way that was kept, in [0, 1]; 1 where nothing was held out.
        begin: D at the beginning, in nats.
        end: D at the end of the way, on the same samples.
        divergence: D where the model is now, on the same samples.
        held_out: whether the run has not seen these samples.
    """

    kept: float
    begin: float
    end: float
    divergence: float
    held_out: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know, a sentence each."""
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
    """Move a model back along the straight line to where it was, to the best point on it.

        w(a) = (1 - a) before + a after,   a = argmin over `fractions` of D(w(a)),

    for weights and running statistics alike; what was 0 at both ends is 0 all along. A refinement
    lowers the divergence on its own samples, and on others mostly, but not by as much; where little
    was damaged, its steps may do more harm than good. With a = 0 among the fractions the result is
    never worse on the samples of D than what was there before.

    Args:
        model: where the run has ended; moved in place.
        before: the model's state dict at the beginning, copied then.
        divergence: D of a model, on samples that the run has not seen.
        fractions: tried in this order, each in [0, 1], 0 and 1 among them; the first of equals is
            taken.

    Returns:
        The fraction taken, and D at both ends and there.

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


def _place(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], fraction: float
) -> None:
    for name, value in model.state_dict().items():
        if fraction in (0.0, 1.0) or not value.is_floating_point():
            value.copy_(before[name] if fraction == 0.0 else after[name])
        else:
            value.copy_(torch.lerp(before[name], after[name], fraction))
