"""Claim 2, robustness to noise: a learned Q against the inverse of the estimated Fisher.

The reference is the exact Fisher of each group, over all training samples and labels, in float64.
All ways see the same samples. `learned` and `inverted` have one drawn label each. `fls` learns on
fresh batches of these samples with fresh labels in each step, as in the paper, so it is compared
with `inverted, all labels`, too. Error and residual share one damping. For the accuracy, the
damping is chosen for each way and number of samples by the mean accuracy on the validation split,
from a grid that is extended where its end is best; the test split is read for the chosen dampings
only.
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
    FLS,
    KFAC,
    OBS,
    AbstractEstimator,
    DiagonalFisher,
    FishLeg,
    Partition,
    prune_once,
)
from fishleg.blocks import AbstractBlock
from fishleg.options import Labels, Structure
from fishleg.solvers.starts import factored_start
from stages.model_folder import Model

TITLE = "Claim 2, robustness to noise: Q learned, or the estimated Fisher inverted"

_PROBES = 8
_QUANTITIES = {"error": "error of Q", "residual": "residual", "test": "test accuracy, %"}
_DIGITS = {"error": 3, "residual": 3, "test": 1}

_Build = Callable[[Partition, float], AbstractEstimator]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to Q.

    Attributes:
        build: partition, damping -> estimator.
        labels: of the calibration samples.
    """

    build: _Build
    labels: Labels = "sampled"


def _fishleg(structure: Structure, **options: Any) -> _Build:
    return lambda partition, damping: FishLeg(
        partition, damping=damping, structure=structure, **{"warm_start": "moments", **options}
    )


class _FactoredKFAC(KFAC):
    """K-FAC with its factors damped one by one, so that Q is a single Kronecker product.

    The alternating solver learns this structure; `KFAC` itself, damped exactly, has free
    eigenvalues and compares with the structure eigen. See `solvers.starts.factored_start`.
    """

    def _invert_factors(self, name: str, sums: list[Tensor]) -> AbstractBlock:
        gamma, a = sums
        return factored_start(torch.block_diag(*gamma), a.mean(0), self.damping)


def _inverted_kronecker(partition: Partition, damping: float) -> AbstractEstimator:
    return _FactoredKFAC(partition, damping=damping)


# Where the inverse itself minimises J, Adam learns it.
_WAYS: dict[str, dict[str, Way]] = {
    "kronecker": {
        "inverted": Way(build=_inverted_kronecker),
        "inverted, all labels": Way(build=_inverted_kronecker, labels="enumerated"),
        "learned": Way(build=_fishleg("kronecker", solver="alternating")),
    },
    "eigen": {
        "inverted": Way(build=lambda partition, damping: KFAC(partition, damping=damping)),
        "learned": Way(build=_fishleg("eigen", warm_start="kfac")),
    },
    "block": {
        "inverted": Way(build=lambda partition, damping: OBS(partition, damping=damping)),
        "learned": Way(build=_fishleg("block", solver="adam")),
    },
    "diagonal": {
        "inverted": Way(
            build=lambda partition, damping: DiagonalFisher(partition, damping=damping)
        ),
        "learned": Way(build=_fishleg("diagonal", solver="adam")),
    },
}

_SCHEDULES = {
    "probe": {"learning_rate": 0.02, "batch": 64},
    "log_det": {"learning_rate": 0.05, "batch": 32},
}
"""Objective of fls -> its settings, chosen on validation images with a seed of their own."""


def cells() -> dict[str, dict[str, Any]]:
    """Return cell name -> parameters: one for each structure, and one for each arm of fls."""
    common = {
        "network": NETWORK,
        "samples": [64, 256, 1024],
        "damping": 1e-3,
        "dampings": [1e-4, 1e-3, 1e-2],
        "sparsity": 0.9,
        "seeds": [0, 1, 2, 3, 4],
    }
    plain = {f"noise[{name}]": {"structure": name, **common} for name in _WAYS}
    fls = {
        f"noise[kronecker,fls,{objective},{start}]": {
            "structure": "kronecker",
            "fls": {
                "objective": objective,
                "warm_start": start,
                "steps": 200,
                "held_out": 0.2,
                "check_every": 25,
                **schedule,
            },
            **common,
        }
        for objective, schedule in _SCHEDULES.items()
        for start in ("identity", "kfac")
    }
    return {**plain, **fls}


def _ways(params: Mapping[str, Any]) -> dict[str, Way]:
    """Return the ways of a cell under their names in the report."""
    options = params.get("fls")
    if options is None:
        return _WAYS[params["structure"]]
    objective = {"probe": "J", "log_det": "L"}[options["objective"]]
    start = {"identity": "identity", "kfac": "K-FAC"}[options["warm_start"]]

    def build(partition: Partition, damping: float) -> AbstractEstimator:
        return FLS(partition, damping=damping, structure=params["structure"], **options)

    return {f"fls, {objective} from {start}": Way(build=build)}


def run_cell(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fit the cell's ways with every number of samples, seed and damping, and prune.

    Returns:
        Way -> for each number of samples: `samples`; by seed, at the damping of all, `error`
        ||Q - Q*||_F / ||Q*||_F and `residual` ||F_gamma Q u - u|| / ||u||, over all groups; the
        `dampings`, with those by which the grid was extended, the chosen `damping` and, by seed,
        `validation` and `test` accuracy in percent.
    """
    digits = load_digits(params["network"], folder)
    truth = _exact_fisher(digits, params["damping"])
    return {
        name: [_measure(digits, truth, way, params, samples) for samples in params["samples"]]
        for name, way in _ways(params).items()
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
    way: Way,
    params: dict[str, Any],
    samples: int,
) -> dict[str, Any]:
    """Return the result of one way with `samples` samples; see `run_cell`."""
    errors: dict[float, list[tuple[float, float]]] = {}
    pruned: dict[float, list[Model]] = {}

    def score(damping: float) -> list[float]:
        for seed in params["seeds"]:
            source = digits.gradients(digits.model, samples=samples, labels=way.labels, seed=seed)
            estimator = way.build(digits.partition, damping)
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
        "The digits' residual network, curvature from calibration samples. Inverted and learned "
        "have one drawn label a sample. fls (FLS) learns by Adam on fresh batches of the samples "
        f"with fresh labels in each of up to {_fls_steps(documents)} steps, by J or the log-det "
        "objective L, and stops by a fifth of the samples; its steps, batch and learning rate were "
        "chosen on the validation split, with a calibration seed of their own. As it sees many "
        "labels a sample, it is compared with the inverse of all labels, too. Error is "
        "||Q - Q*|| / ||Q*|| (Frobenius) and residual ||F Q u - u|| / ||u||, both against the "
        "exact damped Fisher of each group over all training samples, at damping "
        f"{params['damping']:g}. Accuracy is one-shot at {params['sparsity']:g}, its damping "
        f"chosen on the validation split; {explain(first['test'])} of the calibration. "
        "Inverted: K-FAC with its factors damped one by one (kronecker) or exactly (eigen), OBS "
        "blocks, the diagonal. In blocks and on the diagonal that inverse minimises the objective, "
        "so the learned Q, by Adam, differs only by its start and its stopping. Three numbers of "
        "samples keep the time short."
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
            dashed=tuple(way for way in ways if way.startswith("inverted")),
            xlog=True,
            ylog=quantity != "test",
        )
        for structure, ways in results.items()
        for quantity, shown in _QUANTITIES.items()
    ]


def _fls_steps(documents: dict[str, dict[str, Any]]) -> int:
    """Return the most steps of an arm of fls, 0 without one."""
    arms = [one["params"]["fls"] for one in documents.values() if "fls" in one["params"]]
    return max((arm["steps"] for arm in arms), default=0)


def _results(documents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return structure -> way -> result, in the order of the table."""
    found: dict[str, dict[str, Any]] = {name: {} for name in _WAYS}
    for one in sorted(documents.values(), key=lambda one: "fls" in one["params"]):
        found[one["params"]["structure"]] |= one["result"]
    return {name: ways for name, ways in found.items() if ways}


def verdict(documents: dict[str, dict[str, Any]]) -> str:
    """Return for which ways the learned Q is the better one, in error and in accuracy."""
    details: list[str] = []
    holds: list[str] = []
    arms = 0
    for structure, ways in _results(documents).items():
        inverses = [way for way in ways if way.startswith("inverted")]
        for way in [way for way in ways if way not in inverses]:
            arms += 1
            found = [_compare(ways[way], ways[inverse]) for inverse in inverses]
            if all(better for better, _ in found):
                holds.append(f"{structure}, {way}")
            pairs = zip(inverses, found, strict=True)
            against = [f"against {inverse} {text}" for inverse, (_, text) in pairs]
            details.append(f"{structure}, {way}: {'; '.join(against)}")
    where = f"holds here for {'; '.join(holds)} only" if holds else "does not hold here"
    where = "holds here" if len(holds) == arms else where
    counts = next(iter(documents.values()))["params"]["samples"]
    return (
        f"**The claim {where}.** Criterion: the learned Q has the smaller error and the higher "
        "accuracy at more numbers of samples than each inverse of its structure. Clear differences "
        f"at {len(counts)} numbers of samples ({CLEAR}):\n\n"
        + "\n".join(f"- {detail}." for detail in details)
    )


def _compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[bool, str]:
    """Return whether a learned Q is better than an inverse, and how often it is above or below."""
    counts = {
        quantity: tally(
            (one[quantity], other[quantity]) for one, other in zip(ours, theirs, strict=True)
        )
        for quantity in _QUANTITIES
    }
    error, residual, test = (counts[quantity] for quantity in _QUANTITIES)
    better = error["below"] > error["above"] and test["above"] > test["below"]
    return better, (
        f"error lower at {error['below']} and higher at {error['above']}, residual lower at "
        f"{residual['below']} and higher at {residual['above']}, accuracy higher at "
        f"{test['above']} and lower at {test['below']}"
    )
