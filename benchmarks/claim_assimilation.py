"""Claim 3, progressive assimilation: curvature refined while pruning, or estimated again.

Gradual pruning by stage `prune_gradual`, with a Kronecker Q, in three ways. After the first step

    refine       Q continues from the step before, on the Fisher of the survivors;
    fresh        a new Q is fitted to the Fisher of the survivors, on the same samples and masks:
                 it differs from refine by its start alone;
    reestimate   a new Q is fitted to the full Fisher, and earlier zeros are constraints.

All have the same budget in every step: equal numbers of sweeps and of calibration samples. The
damping is chosen for each way and budget by the mean accuracy on the validation split, from a grid
that is extended where its end is best; the test split is read for the chosen dampings only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks._digits import NETWORK, Digits, load_digits
from benchmarks._seeds import CLEAR, Numbers, Panel, draw, explain, order, show
from benchmarks.harness.sweeps import best_of, search
from fishleg.blocks import KroneckerBlock
from fishleg.moments import as_factors, kronecker_products
from fishleg.pruning import group_masks
from fishleg.solvers.starts import factored_start
from stages.catalogue import GradualParams, RefinedFishLegParams
from stages.estimate import user_errors
from stages.model_folder import Model
from stages.stepwise import StepwisePruning
from stages.training import Training

TITLE = "Claim 3, progressive assimilation: curvature refined, or estimated again"

_WAYS = {
    "refine": "refined",
    "fresh": "fresh start, survivors",
    "reestimate": "full Fisher, zeros constrained",
}
_OTHERS = ("fresh", "reestimate")
_SAMPLES = (64, 250, 1000)
_SWEEPS = (1, 4)


def cells() -> dict[str, dict[str, Any]]:
    """Return cell name -> parameters: one cell for each way and budget."""
    return {
        f"{way}[samples={samples},sweeps={sweeps}]": {
            "way": way,
            "samples": samples,
            "sweeps": sweeps,
            "network": NETWORK,
            "sparsity": 0.95,
            "steps": 6,
            "epochs": 1,
            "lr": 0.05,
            "dampings": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
            "seeds": [0, 1, 2, 3, 4],
        }
        for samples in _SAMPLES
        for sweeps in _SWEEPS
        for way in _WAYS
    }


def run_cell(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Prune gradually with every damping and seed.

    Returns:
        The `dampings`, with those by which the grid was extended, the chosen `damping` and, by
        seed, `validation` and `test` accuracy in percent, and `curvature_seconds` of the processor
        in all steps together.
    """
    digits = load_digits(params["network"], folder)
    found: dict[float, list[tuple[Model, float]]] = {}

    def score(damping: float) -> list[float]:
        found[damping] = [_prune(digits, params, damping, seed, folder) for seed in params["seeds"]]
        return [fmean(digits.validate(model) for model, _ in found[damping])]

    scores = search(params["dampings"], score)
    best = best_of({damping: one[0] for damping, one in scores.items()})
    return {
        "dampings": list(scores),
        "damping": best,
        "validation": [digits.validate(model) for model, _ in found[best]],
        "test": [digits.test(model) for model, _ in found[best]],
        "curvature_seconds": [seconds for _, seconds in found[best]],
    }


def _prune(
    digits: Digits, params: dict[str, Any], damping: float, seed: int, folder: Path
) -> tuple[Model, float]:
    """Prune in steps, train between them; return the model and the seconds spent on curvature."""
    recipe = _recipe(params, damping, seed)
    ctx = digits.context(recipe, folder)
    run = StepwisePruning(ctx)
    seconds = 0.0
    for step in range(len(run.sparsities)):
        begin = time.process_time()
        _update(run, params["way"], step)
        seconds += time.process_time() - begin
        run.prune(step)
        training = Training(
            run.model.network, run.dataset, recipe, masks=run.model.masks, purpose=f"step {step}"
        )
        training.run(ctx, first_step=step * recipe.epochs)
    return run.model, seconds


def _recipe(params: dict[str, Any], damping: float, seed: int) -> GradualParams:
    """Return the parameters of the stage; a refinement has as many sweeps as a fit."""
    return GradualParams(
        method="fishleg",
        fishleg=RefinedFishLegParams(
            structure="kronecker",
            warm_start="moments",
            sweeps=params["sweeps"],
            refine_sweeps=params["sweeps"],
        ),
        damping=damping,
        samples=params["samples"],
        carry="reestimate" if params["way"] == "reestimate" else "refine",
        sparsity=params["sparsity"],
        steps=params["steps"],
        epochs=params["epochs"],
        lr=params["lr"],
        seed=seed,
    )


def _update(run: StepwisePruning, way: str, step: int) -> None:
    """Update the curvature before a pruning step, from 0, in one of the ways."""
    if way == "fresh" and step > 0:
        _start_again(run)
    else:
        run.update_curvature(step)


def _start_again(run: StepwisePruning) -> None:
    """Refine from a start that the survivors' gradients give, not from the estimate so far.

    Blocks of other kinds than Kronecker products have a closed form, which takes no start.
    """
    masks = group_masks(run.partition, run.model.masks)
    state = run.estimator.state_dict()
    starts = _starts(run, masks)
    for name, block in run.estimator.blocks().items():
        if isinstance(block, KroneckerBlock):
            for key, tensor in starts[name].tensors().items():
                state["tensors"][f"blocks/{name}/{key}"] = tensor.to(run.source.dtype(name))
    run.estimator.load_state_dict(state)
    with user_errors():
        run.estimator.refine(run.source, masks)


def _starts(run: StepwisePruning, masks: Mapping[str, Tensor]) -> dict[str, KroneckerBlock]:
    """Return the start of a fit, `warm_start: moments`, from the gradients of the survivors."""
    sums: dict[str, list[Tensor]] = {}
    for batch in run.source.stream():
        for name, gradients in batch.items():
            alive = gradients * masks[name] if name in masks else gradients
            products = kronecker_products(alive.double())
            before = sums.get(name, [torch.zeros_like(one) for one in products])
            sums[name] = [one + other for one, other in zip(before, products, strict=True)]
    factors = {name: as_factors(*products) for name, products in sums.items()}
    return {
        name: factored_start(row[0], column[0], run.params.damping)
        for name, (row, column) in factors.items()
    }


# -------------------------------------------------------------------------------- report


def report(documents: dict[str, dict[str, Any]], figures: Path) -> str:
    """Return the Markdown section, and write `claim_assimilation.png` into `figures`."""
    results = _results(documents)
    lines = [
        "| sweeps x samples a step | curvature | damping | test | validation | curvature, CPU s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (sweeps, samples), ways in results.items():
        for way in filter(ways.__contains__, _WAYS):
            found = ways[way]
            lines.append(
                f"| {sweeps} x {samples} | {_WAYS[way]} | {found['damping']:g} "
                f"| {show(found['test'])} | {show(found['validation'])} "
                f"| {show(found['curvature_seconds'], 2)} |"
            )
    draw(_panels(results), figures / "claim_assimilation.png", columns=3)
    params = next(iter(documents.values()))["params"]
    tested = next(iter(next(iter(results.values())).values()))["test"]
    intro = (
        f"The digits' residual network, pruned to {params['sparsity']:g} in {params['steps']} "
        f"steps, epochs of training after each: {params['epochs']}; a Kronecker Q, fitted in "
        "the first step and then refined on the survivors, fitted to the survivors from a fresh "
        "start, or fitted to the full Fisher with the zeros as constraints; with the same sweeps "
        f"and samples per step. Accuracy in percent, {explain(tested)}; damping chosen on the "
        "validation split; a grid whose end was best was extended."
    )
    parts = [intro, "\n".join(lines), verdict(documents)]
    return "\n\n".join([*parts, f"![{TITLE}]({figures.name}/claim_assimilation.png)", ""])


def _panels(results: dict[tuple[int, int], dict[str, dict[str, Any]]]) -> list[Panel]:
    accuracy: dict[str, dict[float, Numbers]] = {}
    seconds: dict[str, dict[float, Numbers]] = {}
    by_time: dict[str, dict[float, Numbers]] = {}
    for (sweeps, samples), ways in results.items():
        for way, found in ways.items():
            label, budget = f"{_WAYS[way]}, sweeps: {sweeps}", sweeps * samples
            accuracy.setdefault(label, {})[budget] = found["test"]
            seconds.setdefault(label, {})[budget] = found["curvature_seconds"]
            by_time.setdefault(label, {})[fmean(found["curvature_seconds"])] = found["test"]
    spent, cost, score = "sweeps x samples a step", "curvature, CPU s", "test accuracy, %"
    dashed = tuple(label for label in accuracy if not label.startswith(_WAYS["refine"]))
    kinds: list[tuple[str, str, str, dict[str, dict[float, Numbers]]]] = [
        ("accuracy", spent, score, accuracy),
        ("time", spent, cost, seconds),
        ("accuracy against time", cost, score, by_time),
    ]
    return [
        Panel(title=title, xlabel=xlabel, ylabel=ylabel, lines=lines, dashed=dashed, xlog=True)
        for title, xlabel, ylabel, lines in kinds
    ]


def _results(
    documents: dict[str, dict[str, Any]],
) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
    """Return budget -> way -> result, in the order of the table."""
    results: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for one in documents.values():
        params = one["params"]
        budget = (params["sweeps"], params["samples"])
        results.setdefault(budget, {})[params["way"]] = one["result"]
    return dict(sorted(results.items()))


def verdict(documents: dict[str, dict[str, Any]]) -> str:
    """Return whether refining beats each of the other ways at equal budgets."""
    results = _results(documents)
    parts = [_against(results, other) for other in _OTHERS]
    return (
        "Criterion, for each other way: refining is clearly better at more budgets than it is "
        f"clearly worse ({CLEAR}).\n\n" + "\n\n".join(parts)
    )


def _against(results: dict[tuple[int, int], dict[str, dict[str, Any]]], other: str) -> str:
    """Return whether refining beats one other way."""
    both = {budget: ways for budget, ways in results.items() if {"refine", other} <= {*ways}}
    if not both:
        return f"No budget has both refining and {_WAYS[other]}, so there is no comparison."
    budgets: dict[str, list[str]] = {"above": [], "below": [], "level": []}
    for (sweeps, samples), ways in both.items():
        found = order(ways["refine"]["test"], ways[other]["test"])
        budgets[found].append(f"{sweeps} x {samples}")
    gains = [fmean(ways["refine"]["test"]) - fmean(ways[other]["test"]) for ways in both.values()]
    times = [
        fmean(ways["refine"]["curvature_seconds"]) / fmean(ways[other]["curvature_seconds"])
        for ways in both.values()
    ]
    holds = len(budgets["above"]) > len(budgets["below"])
    return (
        f"**Against {_WAYS[other]}, the claim {'holds' if holds else 'does not hold'} here.** "
        f"Refining is clearly better at {', '.join(budgets['above']) or 'none'}, worse at "
        f"{', '.join(budgets['below']) or 'none'}, level at {', '.join(budgets['level']) or 'none'}"
        f"; {fmean(gains):+.1f} points of accuracy on average, in {fmean(times):.2f} times the "
        "seconds."
    )
