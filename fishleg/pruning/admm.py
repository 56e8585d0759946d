"""Selection by ADMM: the mask and the survivors' values chosen together, in the quadratic model.

Minimise 1/2 (w - w0)^T H (w - w0) over w and its mask M, H = Q^-1 block by block, M any mask that a
rule allows. With z a copy of w that obeys the mask and u the scaled multiplier of w = z,

    w <- (H + rho I)^-1 (H w0 + rho (z - u)) = w0 + rho (H + rho I)^-1 (z - u - w0)
    z <- w + u where the rule keeps the largest rho (w + u)^2, else 0
    u <- u + w - z,   then   rho <- g rho,   u <- u / g

(Boyd et al., 2011, section 9.1, with a growing penalty; for layer Hessians ALPS, arXiv 2406.07831.)
At a fixed point rho w^2 of a survivor is compared with y^2 / rho of a removed weight, y = rho u its
multiplier; the cost of removing a survivor alone is w^2 / (2 Q_ii), so a group's rho begins at c /
mean(Q_ii). The problem is not convex: of the masks on the way the one of least cost is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fishleg.blocks import AbstractBlock
from fishleg.blocks.base import Resolvent
from fishleg.errors import FishLegError
from fishleg.estimators.base import AbstractEstimator
from fishleg.linalg import conjugate_gradient
from fishleg.options import AdmmOptions
from fishleg.pruning.masks import Masks

Rule = Callable[[Mapping[str, Tensor]], Masks]
"""Group name -> scores (rows, columns), to masks that keep the largest ones."""

_COST_STEPS = 8  # of conjugate gradients, to rank masks; the compensation is exact
_COST_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class AdmmReport:
    """The course of a selection by ADMM.

    Attributes:
        iterations: iterations made.
        settled: whether the mask no longer changed at the end.
        best: iteration of the mask that was kept; 0 is the single-weight selection.
        flips: weights that changed sides, of each iteration.
        primal: ||w - z|| / ||w|| at the end.
        dual: ||rho (z - z before)|| / ||rho u|| at the end.
        before: 1/2 d^T H d of the single-weight selection, in units of the loss, within a percent.
        after: likewise, of the mask that was kept.
    """

    iterations: int
    settled: bool
    best: int
    flips: tuple[int, ...] = field(repr=False)
    primal: float
    dual: float
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """What stays the same of one group: w0, H, and its resolvent."""

    block: AbstractBlock
    inverse: AbstractBlock
    resolvent: Resolvent
    target: Tensor

    @classmethod
    def of(cls, block: AbstractBlock, weights: Tensor) -> _Problem:
        wide = block.double().invert()
        tensors = {name: one.to(weights) for name, one in wide.tensors().items()}
        return cls(
            block=block,
            inverse=wide.restore(tensors, block.shape),
            resolvent=block.resolvent(),
            target=weights,
        )

    def cost(self, mask: Tensor, start: Tensor) -> float:
        """Return about the least 1/2 d^T H d of all w that obey a mask, from w = `start` there."""
        first = torch.where(mask, start, 0.0)
        rhs = torch.where(mask, self.inverse.matvec(self.target - first), 0.0)
        change, _ = conjugate_gradient(
            lambda x: torch.where(mask, self.inverse.matvec(x), 0.0),
            rhs,
            preconditioner=lambda r: torch.where(mask, self.block.matvec(r), 0.0),
            tolerance=_COST_TOLERANCE,
            max_iterations=_COST_STEPS,
        )
        move = first + change - self.target
        return 0.5 * float((move * self.inverse.matvec(move)).double().sum())


@dataclass(frozen=True, kw_only=True)
class _State:
    """One group's w, z and u, its mask, and rho."""

    w: Tensor
    z: Tensor
    u: Tensor
    mask: Tensor
    rho: float


@torch.no_grad()
def admm_masks(
    estimator: AbstractEstimator,
    weights: Mapping[str, Tensor],
    singles: Mapping[str, Tensor],
    rule: Rule,
    *,
    before: Mapping[str, Tensor],
    options: AdmmOptions | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> tuple[Masks, AdmmReport]:
    """Return the best mask that the iterations of ADMM meet, and how they went.

    Args:
        estimator: a fitted estimate of the full Fisher's inverse Q.
        weights: group name -> w0 (rows, columns), of the prunable groups.
        singles: group name -> single-weight costs, whose mask is the one to beat.
        rule: the masks that are allowed.
        before: group name -> bool (rows, columns), the survivors so far; `rule` removes no fewer.
        options: see `AdmmOptions`; None for the defaults.
        callback: takes the iterations made, and how many there are at most.

    Raises:
        FishLegError: Q is fitted on survivors, where (Q_rr)^-1 is not (Q^-1)_rr.

    Errors are also those of `AbstractBlock.invert` and of `rule`.

    Cost: an iteration one product with each group's resolvent and one pass of `rule`; every
    `check_every` iterations up to 9 products with Q and Q^-1. Memory: 6 numbers a weight, and Q^-1
    with the basis of its resolvent.
    """
    if estimator.masks is not None:
        raise FishLegError(
            "selection 'admm' expects a Q of the full Fisher, got one fitted on the survivors of "
            "earlier steps; estimate it again without masks (in a stage, carry: reestimate)."
        )
    options = options or AdmmOptions()
    problems = {n: _Problem.of(estimator.block(n), w.clone()) for n, w in weights.items()}
    best, number = rule(singles), 0
    first = least = sum(problems[n].cost(best[n], w) for n, w in weights.items())
    states = {
        name: _begin(problem, before[name], options.penalty) for name, problem in problems.items()
    }
    flips: list[int] = []
    dual, quiet, judged = 0.0, 0, best
    for iteration in range(1, options.iterations + 1):
        states, flipped, dual = _iterate(problems, states, rule, options.growth)
        flips.append(flipped)
        quiet = 0 if flipped else quiet + 1
        last = quiet >= options.check_every or iteration == options.iterations
        if last or iteration % options.check_every == 0:
            masks = {name: state.mask for name, state in states.items()}
            if any(not torch.equal(mask, judged[name]) for name, mask in masks.items()):
                judged = masks
                cost = sum(problems[n].cost(one.mask, one.w) for n, one in states.items())
                if cost < least:
                    best, least, number = masks, cost, iteration
        if callback is not None:
            callback(iteration, options.iterations)
        if last:
            break
    gap = _norm(state.w - state.z for state in states.values())
    return best, AdmmReport(
        iterations=len(flips),
        settled=quiet >= options.check_every,
        best=number,
        flips=tuple(flips),
        primal=gap / max(_norm(state.w for state in states.values()), 1e-30),
        dual=dual,
        before=first,
        after=least,
    )


def _begin(problem: _Problem, survivors: Tensor, penalty: float) -> _State:
    """Return the state at w = z = w0; rho is `penalty` over the mean of diag Q on survivors."""
    weights = problem.target
    diagonal = problem.block.diagonal()
    mean = (diagonal[survivors] if survivors.any() else diagonal).mean()
    zero = torch.zeros_like(weights)
    rho = penalty / max(float(mean), torch.finfo(mean.dtype).tiny)
    return _State(w=weights, z=weights, u=zero, mask=survivors, rho=rho)


def _iterate(
    problems: Mapping[str, _Problem], states: Mapping[str, _State], rule: Rule, growth: float
) -> tuple[dict[str, _State], int, float]:
    """Return the next states, the weights that changed sides, and the dual residual."""
    sums, moved = {}, {}
    for name, state in states.items():
        problem = problems[name]
        pull = problem.resolvent(state.z - state.u - problem.target, state.rho)
        w = problem.target + state.rho * pull
        moved[name] = replace(state, w=w)
        sums[name] = w + state.u
    masks = rule({name: states[name].rho * one.square() for name, one in sums.items()})
    after, flipped = {}, 0
    changes, multipliers = [], []
    for name, state in moved.items():
        mask = masks[name]
        z = torch.where(mask, sums[name], 0.0)
        u = sums[name] - z
        flipped += int((mask != state.mask).sum())
        changes.append(state.rho * (z - state.z))
        multipliers.append(state.rho * u)
        after[name] = replace(state, z=z, u=u / growth, mask=mask, rho=state.rho * growth)
    return after, flipped, _norm(changes) / max(_norm(multipliers), 1e-30)


def _norm(parts: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all parts together."""
    return sum(float(part.double().square().sum()) for part in parts) ** 0.5
