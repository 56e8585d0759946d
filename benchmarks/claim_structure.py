"""Claim 1, factorisation: cost and accuracy of each structure of Q, against the full inverse.

FishLeg in each of its structures, and Eigen, on a network that is small enough for the full inverse
of every group. One-shot, joint compensation. The damping is chosen for each structure and sparsity
by the mean accuracy on the validation split, from a grid that is extended where its end is best;
the test split is read for the chosen dampings only.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks._digits import NETWORK, Digits, load_digits
from benchmarks._seeds import CLEAR, Panel, draw, explain, show, tally
from benchmarks.harness.sweeps import best_of, search
from fishleg import AbstractEstimator, Eigen, FishLeg, prune_once
from stages.model_folder import Model

TITLE = "Claim 1, factorisation: the structure of Q"

_STRUCTURES = (
    "full",
    "block",
    "kronecker",
    "kronecker_scaled",
    "tensor",
    "tensor_scaled",
    "diagonal",
    "eigen",
)
_FACTORED = ("kronecker", "kronecker_scaled", "tensor", "tensor_scaled", "eigen")


def cells() -> dict[str, dict[str, Any]]:
    """Return cell name -> parameters: one cell for each structure."""
    return {
        f"structure[{structure}]": {
            "structure": structure,
            "network": NETWORK,
            "samples": 1000,
            "sparsities": [0.8, 0.9, 0.95],
            "dampings": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
            "seeds": [0, 1, 2, 3, 4],
        }
        for structure in _STRUCTURES
    }


def run_cell(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fit and prune with every damping, seed and sparsity.

    Returns:
        `dense`: accuracy of the unpruned network on both splits; `memory_bytes` of the estimate;
        `fit_seconds`: of the processor, of every fit; `sparsities`: for each, the `dampings`, with
        those by which the grid was extended, the chosen `damping` and, by seed, `validation` and
        `test` accuracy in percent.
    """
    digits = load_digits(params["network"], folder)
    pruned: dict[float, list[list[Model]]] = {}  # damping -> sparsity -> seed
    seconds: list[float] = []
    memory = 0

    def score(damping: float) -> list[float]:
        nonlocal memory
        fits = [_fit(digits, params, damping, seed) for seed in params["seeds"]]
        seconds.extend(took_s for _, took_s in fits)
        memory = fits[0][0].memory_bytes()
        pruned[damping] = [
            [_prune(digits, estimator, sparsity) for estimator, _ in fits]
            for sparsity in params["sparsities"]
        ]
        return [fmean(map(digits.validate, models)) for models in pruned[damping]]

    scores = search(params["dampings"], score)
    return {
        "dense": {"validation": digits.validate(digits.model), "test": digits.test(digits.model)},
        "memory_bytes": memory,
        "fit_seconds": seconds,
        "sparsities": [
            _result(digits, sparsity, {d: (scores[d][at], pruned[d][at]) for d in scores})
            for at, sparsity in enumerate(params["sparsities"])
        ],
    }


def _fit(
    digits: Digits, params: dict[str, Any], damping: float, seed: int
) -> tuple[AbstractEstimator, float]:
    """Return an estimate of the dense network, and the seconds of the processor that it took."""
    structure = params["structure"]
    estimator: AbstractEstimator
    if structure == "eigen":
        estimator = Eigen(digits.partition, damping=damping, basis="moments")
    else:
        estimator = FishLeg(
            digits.partition, damping=damping, structure=structure, warm_start="moments"
        )
    source = digits.gradients(digits.model, samples=params["samples"], labels="matched", seed=seed)
    begin = time.process_time()
    estimator.fit(source)
    return estimator, time.process_time() - begin


def _prune(digits: Digits, estimator: AbstractEstimator, sparsity: float) -> Model:
    """Return a pruned copy of the dense network."""
    model = replace(digits.model, network=copy.deepcopy(digits.model.network))
    prune_once(model.network, estimator, sparsity=sparsity)
    return model


def _result(
    digits: Digits, sparsity: float, pruned: dict[float, tuple[float, list[Model]]]
) -> dict[str, Any]:
    """Return the accuracies at a sparsity with the best damping on validation data.

    Args:
        digits: the network.
        sparsity: of the models.
        pruned: damping -> mean validation accuracy, and the model of each seed.
    """
    best = best_of({damping: score for damping, (score, _) in pruned.items()})
    models = pruned[best][1]
    return {
        "sparsity": sparsity,
        "dampings": list(pruned),
        "damping": best,
        "validation": [digits.validate(model) for model in models],
        "test": [digits.test(model) for model in models],
    }


# -------------------------------------------------------------------------------- report


def report(documents: dict[str, dict[str, Any]], figures: Path) -> str:
    """Return the Markdown section, and write `claim_structure.png` into `figures`."""
    results = _results(documents)
    peaks = {one["params"]["structure"]: one["peak_bytes"] for one in documents.values()}
    first = next(iter(results.values()))
    sparsities = [at["sparsity"] for at in first["sparsities"]]
    heads = [f"{sparsity:g} {split}" for sparsity in sparsities for split in ("test", "validation")]
    lines = [
        f"| structure | {' | '.join(heads)} | kB of Q | fit, CPU s | peak, MB |",
        f"|---|{'---:|' * (len(heads) + 3)}",
    ]
    for structure, result in results.items():
        accuracies = [
            f"{show(at['test'])} ({at['damping']:g}) | {show(at['validation'])}"
            for at in result["sparsities"]
        ]
        lines.append(
            f"| {structure} | {' | '.join(accuracies)} | {result['memory_bytes'] / 1e3:.0f} "
            f"| {show(result['fit_seconds'], 2)} | {peaks[structure] / 1e6:.0f} |"
        )
    draw(_panels(results), figures / "claim_structure.png", columns=3)
    intro = (
        "FishLeg on the digits' residual network "
        f"({first['dense']['test']:.1f} % dense), one-shot from 1,000 calibration samples. "
        f"Accuracy in percent, {explain(first['sparsities'][0]['test'])} of the calibration; in "
        "brackets the damping, chosen on the validation split; a grid whose end was best was "
        "extended. Peak: memory of the whole process."
    )
    parts = [intro, "\n".join(lines), verdict(documents)]
    return "\n\n".join([*parts, f"![{TITLE}]({figures.name}/claim_structure.png)", ""])


def _panels(results: dict[str, dict[str, Any]]) -> list[Panel]:
    accuracy = {
        structure: {at["sparsity"]: at["test"] for at in result["sparsities"]}
        for structure, result in results.items()
    }
    last = {structure: list(points.values())[-1] for structure, points in accuracy.items()}
    sparsest = max(at for points in accuracy.values() for at in points)
    memory = {name: {results[name]["memory_bytes"] / 1e3: last[name]} for name in results}
    seconds = {name: {fmean(results[name]["fit_seconds"]): last[name]} for name in results}
    label = f"test accuracy at {sparsest:g}, %"
    return [
        Panel(title="accuracy", xlabel="sparsity", ylabel="test accuracy, %", lines=accuracy),
        Panel(title="memory of Q", xlabel="kB", ylabel=label, lines=memory, xlog=True),
        Panel(title="time of a fit", xlabel="CPU s", ylabel=label, lines=seconds, xlog=True),
    ]


def _results(documents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return structure -> result, in the order of the table."""
    results = {one["params"]["structure"]: one["result"] for one in documents.values()}
    return {name: results[name] for name in _STRUCTURES if name in results}


def verdict(documents: dict[str, dict[str, Any]]) -> str:
    """Return the factored structures that keep the full inverse's accuracy with less memory."""
    results = _results(documents)
    if "full" not in results:
        return "The full inverse is missing, so there is no comparison."
    full = results["full"]
    details: list[str] = []
    holds: list[str] = []
    factored = [structure for structure in _FACTORED if structure in results]
    for structure in factored:
        result = results[structure]
        pairs = [
            (at["test"], best["test"])
            for at, best in zip(result["sparsities"], full["sparsities"], strict=True)
        ]
        counts = tally(pairs)
        if counts["above"] >= counts["below"]:
            holds.append(structure)
        gaps = ", ".join(f"{fmean(ours) - fmean(theirs):+.1f}" for ours, theirs in pairs)
        details.append(
            f"{structure}: {gaps} points, clearly above at {counts['above']} and below at "
            f"{counts['below']}, with {100 * result['memory_bytes'] / full['memory_bytes']:.2g} % "
            "of the memory"
        )
    where = f"holds here for {', '.join(holds)} only" if holds else "does not hold here"
    where = "holds here" if len(holds) == len(factored) else where
    sparsities = ", ".join(f"{at['sparsity']:g}" for at in full["sparsities"])
    return (
        f"**The claim {where}.** Criterion: a factored Q is clearly below the full inverse at no "
        "more sparsities than it is clearly above it. Against the full inverse at "
        f"{sparsities}: {'; '.join(details)} ({CLEAR})."
    )
