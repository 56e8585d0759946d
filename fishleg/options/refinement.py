"""Options of the refinement after a pruning step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fishleg.options.choices import RefinementMethod, Statistics
from fishleg.options.fields import Options, Range


@dataclass(frozen=True, kw_only=True)
class RefinementOptions(Options):
    """Options of the moves of survivors back towards the dense network's outputs.

    Attributes:
        method: "sgd", with momentum; "adam" (Kingma and Ba, arXiv 1412.6980); "natural": u = m o Q
            (m o g), the FishLeg update (Garcia et al., ICLR 2023), with momentum; "gauss_newton":
            the solution of (F_rr + gamma I) d = -g on the batch, by conjugate gradients
            preconditioned by Q.
        learning_rate: at its peak; None for the method's own. Those are 0.01, 5e-3, 0.1 and 1.
            Linear warm-up over the first twentieth of the steps, then a half cosine down to 0 (no
            schedule for "gauss_newton"). Adam's moves do not shrink with the gradient, so its rate
            is that of a run from D = 1 nat, multiplied by min(1, sqrt(D)) for the run's own D: in a
            quadratic the distance to the optimum grows as the root of the divergence.
        momentum: of "sgd" and "natural", and the first decay of "adam", in [0, 1).
        trust: "natural": longest step, as the divergence 1/2 d^T F_g d that Q predicts for it, in
            nats; > 0.
        cg_iterations: "gauss_newton": at most, a step.
        temperature: T > 0: both outputs are divided by it, and the divergence multiplied by T^2
            (Hinton et al., arXiv 1503.02531).
        statistics: removing weights shifts the means and variances that batch norms divide by.
            "running": they normalise by their running ones, which follow the batches; see
            `following_norms`. "batch": by the batch, as in training, which makes noise but lets
            gradients through the moments. "frozen": by their own, which stay.
        bfloat16: of forward and backward passes; weights and moments stay as they are.
    """

    method: RefinementMethod = "adam"
    learning_rate: Annotated[float | None, Range(gt=0)] = None
    momentum: Annotated[float, Range(ge=0, lt=1)] = 0.9
    trust: Annotated[float, Range(gt=0, unit="nats")] = 1e-2
    cg_iterations: Annotated[int, Range(ge=1)] = 10
    temperature: Annotated[float, Range(gt=0)] = 1.0
    statistics: Statistics = "running"
    bfloat16: bool = False
