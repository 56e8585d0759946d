"""Claim 2, robustness to noise: a learned Q against the inverse of the estimated Fisher.

The reference is the exact Fisher of each group, over all training samples and labels, in float64.
Both ways see the same samples, with one drawn label each. Error and residual share one damping. For
the accuracy, the damping is chosen for each way and number of samples by the mean accuracy on the
validation split, from a grid that is extended where its end is best; the test split is read for the
chosen dampings only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks._digits import NETWORK, Digits, load_digits
from benchmarks._seeds import CLEAR, Panel, draw, explain, show, tally
from benchmarks.harness.sweeps import best_of, search
from fishleg import (
    KFAC,
    OBS,
    AbstractEstimator,
    DiagonalFisher,
    Eigen,
    FishLeg,
    Partition,
    prune_once,
)
from fishleg.blocks import AbstractBlock
from fishleg.options import Structure
from fishleg.solvers.starts import factored_start
from stages.model_folder import Model

TITLE = "Claim 2, robustness to noise: Q learned, or the estimated Fisher inverted"

_PROBES = 8
_QUANTITIES = {"error": "error of Q", "residual": "residual", "test": "test accuracy, %"}
_DIGITS = {"error": 3, "residual": 3, "test": 1}

_Build = Callable[[Partition, float], AbstractEstimator]


def _fishleg(structure: Structure, **options: Any) -> _Build:
    return lambda partition, damping: FishLeg(
        partition, damping=damping, structure=structure, **{"warm_start": "moments", **options}
    )


class _FactoredKFAC(KFAC):
    """K-FAC with its factors damped one by one, so that Q is a single Kronecker product.

    The alternating solver learns this structure; `KFAC` itself, damped exactly, has free
    eigenvalues and compares with `Eigen`. See `solvers.starts.factored_start`.
    """

    def _invert_factors(self, name: str, sums: list[Tensor]) -> AbstractBlock:
        gamma, a = sums
        return factored_start(torch.block_diag(*gamma), a.mean(0), self.damping)


# Where the inverse itself minimises J, Adam learns it.
_WAYS: dict[str, dict[str, _Build]] = {
    "kronecker": {
        "learned": _fishleg("kronecker", solver="alternating"),
        "inverted": lambda partition, damping: _FactoredKFAC(partition, damping=damping),
    },
    "eigen": {
        "learned": lambda partition, damping: Eigen(partition, damping=damping),
        "inverted": lambda partition, damping: KFAC(partition, damping=damping),
    },
    "block": {
        "learned": _fishleg("block", solver="adam"),
        "inverted": lambda partition, damping: OBS(partition, damping=damping),
    },
    "diagonal": {
        "learned": _fishleg("diagonal", solver="adam"),
        "inverted": lambda partition, damping: DiagonalFisher(partition, damping=damping),
    },
}


def cells() -> dict[str, dict[str, Any]]:
    """Return cell name -> parameters: one cell for each structure."""
    return {
        f"noise[{structure}]": {
            "structure": structure,
            "network": NETWORK,
            "samples": [64, 128, 256, 512, 1024],
            "damping": 1e-3,
            "dampings": [1e-4, 1e-3, 1e-2],
            "sparsity": 0.9,
            "seeds": [0, 1, 2, 3, 4],
        }
        for structure in _WAYS
    }


def run_cell(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fit both ways with every number of samples, seed and damping, and prune.

    Returns:
        Way -> for each number of samples: `samples`; by seed, at the damping of all, `error`
        ||Q - Q*||_F / ||Q*||_F and `residual` ||F_gamma Q u - u|| / ||u||, over all groups; the
        `dampings`, with those by which the grid was extended, the chosen `damping` and, by seed,
        `validation` and `test` accuracy in percent.
    """
    digits = load_digits(params["network"], folder)
    truth = _exact_fisher(digits, params["damping"])
    return {
        way: [_measure(digits, truth, build, params, samples) for samples in params["samples"]]
        for way, build in _WAYS[params["structure"]].items()
    }


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The exact F_gamma of one group and its inverse, (size, size), float64."""

    fisher: Tensor
    inverse: Tensor


def _exact_fisher(digits: Digits, damping: float) -> dict[str, Truth]:
    """Return group name -> truth, over all training samples and labels.

    Cost: 2 N C size^2 FLOPs a group for N samples of C classes, and size^3 for the inverse.
    """
    source = digits.gradients(
        digits.model, samples=len(digits.dataset.train), labels="enumerated", seed=0
    )
    fishers = {
        group.name: damping * torch.eye(group.size, dtype=torch.float64)
        for group in digits.partition.groups
    }
    for batch in source.stream():
        for name, gradients in batch.items():
            rows = gradients.flatten(1).double()
            fishers[name].addmm_(rows.mT, rows)
    return {
        name: Truth(fisher=fisher, inverse=torch.cholesky_inverse(torch.linalg.cholesky(fisher)))
        for name, fisher in fishers.items()
    }


def _measure(
    digits: Digits,
    truth: Mapping[str, Truth],
    build: _Build,
    params: dict[str, Any],
    samples: int,
) -> dict[str, Any]:
    """Return the result of one way with `samples` samples; see `run_cell`."""
    errors: dict[float, list[tuple[float, float]]] = {}
    pruned: dict[float, list[Model]] = {}

    def score(damping: float) -> list[float]:
        for seed in params["seeds"]:
            source = digits.gradients(digits.model, samples=samples, labels="sampled", seed=seed)
            estimator = build(digits.partition, damping)
            estimator.fit(source)
            if damping == params["damping"]:
                errors.setdefault(damping, []).append(_errors(estimator, truth))
            model = replace(digits.model, network=copy.deepcopy(digits.model.network))
            prune_once(model.network, estimator, sparsity=params["sparsity"])
            pruned.setdefault(damping, []).append(model)
        return [fmean(map(digits.validate, pruned[damping]))]

    scores = search(sorted({*params["dampings"], params["damping"]}), score)
    best = best_of({damping: found[0] for damping, found in scores.items()})
    return {
        "samples": samples,
        "error": [error for error, _ in errors[params["damping"]]],
        "residual": [residual for _, residual in errors[params["damping"]]],
        "dampings": list(scores),
        "damping": best,
        "validation": [digits.validate(model) for model in pruned[best]],
        "test": [digits.test(model) for model in pruned[best]],
    }


def _errors(estimator: AbstractEstimator, truth: Mapping[str, Truth]) -> tuple[float, float]:
    """Return ||Q - Q*||_F / ||Q*||_F and ||F_gamma Q u - u|| / ||u||, all groups together.

    The residual is that of the certificate with the parts of F between groups left out, over
    Gaussian u.
    """
    draws = torch.Generator().manual_seed(0)
    gap = size = rest = length = 0.0
    for name, block in estimator.blocks().items():
        exact = truth[name]
        q = block.dense().double()
        u = torch.randn(len(q), _PROBES, generator=draws, dtype=torch.float64)
        gap += float((q - exact.inverse).square().sum())
        size += float(exact.inverse.square().sum())
        rest += float((exact.fisher @ (q @ u) - u).square().sum())
        length += float(u.square().sum())
    return (gap / size) ** 0.5, (rest / length) ** 0.5


# -------------------------------------------------------------------------------- report


def report(documents: dict[str, dict[str, Any]], figures: Path) -> str:
    """Return the Markdown section, and write `claim_noise.png` into `figures`."""
    results = _results(documents)
    params = next(iter(documents.values()))["params"]
    counts = params["samples"]
    lines = [
        f"| structure | Q | | {' | '.join(f'{count} samples' for count in counts)} |",
        f"|---|---|---|{'---:|' * len(counts)}",
    ]
    for structure, ways in results.items():
        for quantity, shown in _QUANTITIES.items():
            for way, points in ways.items():
                values = [show(at[quantity], _DIGITS[quantity]) for at in points]
                lines.append(f"| {structure} | {way} | {shown} | {' | '.join(values)} |")
    draw(_panels(results), figures / "claim_noise.png", columns=len(_QUANTITIES))
    first = next(iter(next(iter(results.values())).values()))[0]
    intro = (
        "The digits' residual network, curvature from calibration samples with one drawn label "
        "each. Error is ||Q - Q*|| / ||Q*|| (Frobenius) and residual ||F Q u - u|| / ||u||, both "
        "against the exact damped Fisher of each group over all training samples, at damping "
        f"{params['damping']:g}. Accuracy is one-shot at {params['sparsity']:g}, its damping "
        f"chosen on the validation split; {explain(first['test'])} of the calibration. "
        "Inverted: K-FAC with its factors damped one by one (kronecker) or exactly (eigen), OBS "
        "blocks, the diagonal. In blocks and on the diagonal that inverse minimises the objective, "
        "so the learned Q, by Adam, differs only by its start and its stopping."
    )
    parts = [intro, "\n".join(lines), verdict(documents)]
    return "\n\n".join([*parts, f"![{TITLE}]({figures.name}/claim_noise.png)", ""])


def _panels(results: dict[str, dict[str, Any]]) -> list[Panel]:
    return [
        Panel(
            title=structure,
            xlabel="calibration samples",
            ylabel=shown,
            lines={
                way: {at["samples"]: at[quantity] for at in points} for way, points in ways.items()
            },
            dashed=("inverted",),
            xlog=True,
            ylog=quantity != "test",
        )
        for structure, ways in results.items()
        for quantity, shown in _QUANTITIES.items()
    ]


def _results(documents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return structure -> result, in the order of the table."""
    results = {one["params"]["structure"]: one["result"] for one in documents.values()}
    return {name: results[name] for name in _WAYS if name in results}


def verdict(documents: dict[str, dict[str, Any]]) -> str:
    """Return for which structures the learned Q is the better one, in error and in accuracy."""
    results = _results(documents)
    details: list[str] = []
    holds: list[str] = []
    for structure, ways in results.items():
        counts = {
            quantity: tally(
                (ours[quantity], theirs[quantity])
                for ours, theirs in zip(ways["learned"], ways["inverted"], strict=True)
            )
            for quantity in _QUANTITIES
        }
        nearer = counts["error"]["below"] > counts["error"]["above"]
        if nearer and counts["test"]["above"] > counts["test"]["below"]:
            holds.append(structure)
        details.append(
            f"{structure}: error lower at {counts['error']['below']} and higher at "
            f"{counts['error']['above']} of {len(ways['learned'])} numbers of samples, residual "
            f"lower at {counts['residual']['below']} and higher at {counts['residual']['above']}, "
            f"accuracy higher at {counts['test']['above']} and lower at {counts['test']['below']}"
        )
    where = f"holds here for {', '.join(holds)} only" if holds else "does not hold here"
    where = "holds here" if len(holds) == len(results) else where
    return (
        f"**The claim {where}.** Criterion: the learned Q has the smaller error and the higher "
        "accuracy at more numbers of samples than the inverse. Learned against "
        f"inverted: {'; '.join(details)} ({CLEAR})."
    )
