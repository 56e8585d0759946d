"""Claim 3, progressive assimilation: curvature refined while pruning, or estimated again.

Gradual pruning by stage `prune_gradual`, with a Kronecker Q. Both ways have the same budget in
every step: equal numbers of sweeps and of calibration samples. The damping is chosen for each way
and budget by the mean accuracy on the validation split; the test split is read for the chosen
dampings only.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks._digits import NETWORK, Digits, load_digits
from benchmarks._seeds import CLEAR, Numbers, Panel, draw, explain, order, show
from stages.catalogue import GradualParams, RefinedFishLegParams
from stages.model_folder import Model
from stages.stepwise import StepwisePruning
from stages.training import Training

TITLE = "Claim 3, progressive assimilation: curvature refined, or estimated again"

_CARRIES = ("refine", "reestimate")
_SAMPLES = (64, 250, 1000)
_SWEEPS = (1, 4)


def cells() -> dict[str, dict[str, Any]]:
    """Return cell name -> parameters: one cell for each way and budget."""
    return {
        f"{carry}[samples={samples},sweeps={sweeps}]": {
            "carry": carry,
            "samples": samples,
            "sweeps": sweeps,
            "network": NETWORK,
            "sparsity": 0.95,
            "steps": 6,
            "epochs": 1,
            "lr": 0.05,
            "dampings": [1e-4, 1e-3, 1e-2],
            "seeds": [0, 1, 2, 3, 4],
        }
        for samples in _SAMPLES
        for sweeps in _SWEEPS
        for carry in _CARRIES
    }


def run_cell(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Prune gradually with every damping and seed.

    Returns:
        The chosen `damping` and, by seed, `validation` and `test` accuracy in percent, and
        `curvature_seconds` of the processor in all steps together.
    """
    digits = load_digits(params["network"], folder)
    found = {
        damping: [_prune(digits, params, damping, seed, folder) for seed in params["seeds"]]
        for damping in params["dampings"]
    }
    validation = {
        damping: [digits.validate(model) for model, _ in runs] for damping, runs in found.items()
    }
    best = max(params["dampings"], key=lambda damping: fmean(validation[damping]))
    return {
        "damping": best,
        "validation": validation[best],
        "test": [digits.test(model) for model, _ in found[best]],
        "curvature_seconds": [seconds for _, seconds in found[best]],
    }


def _prune(
    digits: Digits, params: dict[str, Any], damping: float, seed: int, folder: Path
) -> tuple[Model, float]:
    """Prune in steps, train between them; return the model and the seconds spent on curvature."""
    recipe = GradualParams(
        method="fishleg",
        # a refinement's sweeps are as many as a fit's: equal budgets
        fishleg=RefinedFishLegParams(
            structure="kronecker",
            warm_start="moments",
            sweeps=params["sweeps"],
            refine_sweeps=params["sweeps"],
        ),
        damping=damping,
        samples=params["samples"],
        carry=params["carry"],
        sparsity=params["sparsity"],
        steps=params["steps"],
        epochs=params["epochs"],
        lr=params["lr"],
        seed=seed,
    )
    ctx = digits.context(recipe, folder)
    run = StepwisePruning(ctx)
    seconds = 0.0
    for step in range(len(run.sparsities)):
        begin = time.process_time()
        run.update_curvature(step)
        seconds += time.process_time() - begin
        run.prune(step)
        training = Training(
            run.model.network, run.dataset, recipe, masks=run.model.masks, purpose=f"step {step}"
        )
        training.run(ctx, first_step=step * recipe.epochs)
    return run.model, seconds


# -------------------------------------------------------------------------------- report


def report(documents: dict[str, dict[str, Any]], figures: Path) -> str:
    """Return the Markdown section, and write `claim_assimilation.png` into `figures`."""
    results: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for one in documents.values():
        params = one["params"]
        budget = (params["sweeps"], params["samples"])
        results.setdefault(budget, {})[params["carry"]] = one["result"]
    results = dict(sorted(results.items()))
    lines = [
        "| sweeps x samples a step | curvature | damping | test | validation | curvature, CPU s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (sweeps, samples), ways in results.items():
        for carry in filter(ways.__contains__, _CARRIES):
            found = ways[carry]
            lines.append(
                f"| {sweeps} x {samples} | {carry} | {found['damping']:g} | {show(found['test'])} "
                f"| {show(found['validation'])} | {show(found['curvature_seconds'], 2)} |"
            )
    draw(_panels(results), figures / "claim_assimilation.png", columns=3)
    params = next(iter(documents.values()))["params"]
    tested = next(iter(next(iter(results.values())).values()))["test"]
    intro = (
        f"The digits' residual network, pruned to {params['sparsity']:g} in {params['steps']} "
        f"steps, epochs of training after each: {params['epochs']}; a Kronecker Q, fitted in "
        "the first step and then refined or estimated again, with the same sweeps and samples per "
        f"step. Accuracy in percent, {explain(tested)}; damping chosen on the validation split."
    )
    parts = [intro, "\n".join(lines), _verdict(results)]
    return "\n\n".join([*parts, f"![{TITLE}]({figures.name}/claim_assimilation.png)", ""])


def _panels(results: dict[tuple[int, int], dict[str, dict[str, Any]]]) -> list[Panel]:
    accuracy: dict[str, dict[float, Numbers]] = {}
    seconds: dict[str, dict[float, Numbers]] = {}
    by_time: dict[str, dict[float, Numbers]] = {}
    for (sweeps, samples), ways in results.items():
        for carry, found in ways.items():
            label, budget = f"{carry}, sweeps: {sweeps}", sweeps * samples
            accuracy.setdefault(label, {})[budget] = found["test"]
            seconds.setdefault(label, {})[budget] = found["curvature_seconds"]
            by_time.setdefault(label, {})[fmean(found["curvature_seconds"])] = found["test"]
    spent, cost, score = "sweeps x samples a step", "curvature, CPU s", "test accuracy, %"
    dashed = tuple(label for label in accuracy if label.startswith("reestimate"))
    kinds: list[tuple[str, str, str, dict[str, dict[float, Numbers]]]] = [
        ("accuracy", spent, score, accuracy),
        ("time", spent, cost, seconds),
        ("accuracy against time", cost, score, by_time),
    ]
    return [
        Panel(title=title, xlabel=xlabel, ylabel=ylabel, lines=lines, dashed=dashed, xlog=True)
        for title, xlabel, ylabel, lines in kinds
    ]


def _verdict(results: dict[tuple[int, int], dict[str, dict[str, Any]]]) -> str:
    """Return whether refining beats estimating again at equal budgets."""
    both = {budget: ways for budget, ways in results.items() if set(ways) == set(_CARRIES)}
    if not both:
        return "No budget has both ways, so there is no comparison."
    budgets: dict[str, list[str]] = {"above": [], "below": [], "level": []}
    for (sweeps, samples), ways in both.items():
        found = order(ways["refine"]["test"], ways["reestimate"]["test"])
        budgets[found].append(f"{sweeps} x {samples}")
    gains = [
        fmean(ways["refine"]["test"]) - fmean(ways["reestimate"]["test"]) for ways in both.values()
    ]
    times = [
        fmean(ways["refine"]["curvature_seconds"]) / fmean(ways["reestimate"]["curvature_seconds"])
        for ways in both.values()
    ]
    holds = len(budgets["above"]) > len(budgets["below"])
    return (
        f"**The claim {'holds' if holds else 'does not hold'} here.** Criterion: refining is "
        "clearly better at more budgets than it is clearly worse. Clearly better at "
        f"{', '.join(budgets['above']) or 'none'}, worse at {', '.join(budgets['below']) or 'none'}"
        f", level at {', '.join(budgets['level']) or 'none'}; {fmean(gains):+.1f} points of "
        f"accuracy on average, in {fmean(times):.2f} times the seconds ({CLEAR})."
    )
