"""The FishLeg optimiser against SGD with momentum and Adam: loss against steps and against seconds.

Three problems: the MNIST autoencoder 784-1000-500-250-30 and back (Hinton and Salakhutdinov, 2006),
ResNet20 on CIFAR-10, and a small residual network on the digits, from fresh weights. Each method is
tuned with the same effort, short trials chosen by the validation loss (eight on the digits, else
six); then one longer run of equal steps for each seed. The test set is not read.

Two rows tell whether learning helps: FishLeg with its correction lambda frozen at zero, so that Q
is its start, and K-FAC, the frozen optimiser with a start from K-FAC factors. Both have FishLeg's
scale of Q, momentum and trust region.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks._problems import PROBLEMS, Problem
from benchmarks._seeds import CLEAR, deviation, label_decades, order, show
from fishleg.likelihoods import Likelihood
from fishleg.optim import FishLeg
from pipeline.stage import write_json

TITLE = "The optimiser: loss against steps and seconds"

_STEPS = {  # of a trial, of a final run
    "autoencoder": (300, 1500),
    "digits": (100, 300),
    "resnet20": (100, 400),
}
_BATCH = {"autoencoder": 500, "digits": 64, "resnet20": 64}
_SEEDS = {"autoencoder": [0], "digits": [0, 1, 2, 3, 4], "resnet20": [0]}
_DIVERGED = 1e9  # replaces a loss that is not finite
_POINTS = 12  # evaluations of the validation loss in a run
_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "autoencoder": {
        "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    },
    "digits": {
        "sgd": (3e-3, 1e-2, 3e-2, 1e-1, 2e-1, 3e-1, 5e-1, 1.0),
        "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    },
    "resnet20": {
        "sgd": (1e-2, 3e-2, 1e-1, 2e-1, 5e-1, 1.0),
        "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    },
}
_DAMPINGS = {
    "autoencoder": (0.01, 0.03, 0.1),
    "digits": (0.03, 0.1, 0.3, 1.0),
    "resnet20": (0.003, 0.01, 0.03),
}
_TRUSTS = {"autoencoder": (0.1, 0.3), "digits": (0.01, 0.03), "resnet20": (0.03, 0.1)}
_TRACKING: dict[str, dict[str, Any]] = {
    "fishleg": {},
    "frozen": {"learning_rate": 0.0},
    "kfac": {"learning_rate": 0.0, "start": "kfac"},
}
"""Method -> options of FishLeg's optimiser."""
_NAMES = {
    "sgd": "SGD, momentum 0.9",
    "adam": "Adam",
    "fishleg": "FishLeg",
    "frozen": "FishLeg, frozen",
    "kfac": "K-FAC",
}
_METHODS = {
    "autoencoder": ["sgd", "adam", "fishleg"],
    "digits": list(_NAMES),
    "resnet20": list(_NAMES),
}


def cells() -> dict[str, dict[str, Any]]:
    """Return cell name -> parameters: equal numbers of trials for all methods of a problem."""
    return {
        f"{problem}/{method}": {
            "problem": problem,
            "method": method,
            "grid": _grid(problem, method),
            "trial_steps": _STEPS[problem][0],
            "steps": _STEPS[problem][1],
            "batch_size": _BATCH[problem],
            "seeds": _SEEDS[problem],
        }
        for problem, methods in _METHODS.items()
        for method in methods
    }


def _grid(problem: str, method: str) -> list[dict[str, float]]:
    if method not in _TRACKING:
        return [{"lr": rate} for rate in _RATES[problem][method]]
    return [
        {"lr": 0.3, "damping": damping, "trust": trust}
        for damping in _DAMPINGS[problem]
        for trust in _TRUSTS[problem]
    ]


def run_cell(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the trials and the final runs of one cell; finished ones are read from `folder`.

    Returns:
        `trials`: settings and last validation loss, of the first seed; `settings`: the best;
        `runs`: for each seed `train`, the loss of every step's batch; `validation`, [step, seconds
        of training, loss]; and `seconds`. Seconds are the processor's.
    """
    first, *_ = params["seeds"]
    trials = []
    for number, settings in enumerate(params["grid"]):
        found = _kept(
            folder / f"trial-{number}.json",
            partial(_run, params, settings, params["trial_steps"], first),
        )
        trials.append({"settings": settings, "validation": found["validation"][-1][2]})
    best = min(trials, key=lambda trial: trial["validation"])["settings"]
    runs = [
        _kept(folder / f"final-{seed}.json", partial(_run, params, best, params["steps"], seed))
        for seed in params["seeds"]
    ]
    return {"trials": trials, "settings": best, "runs": runs}


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text("utf-8"))


# -------------------------------------------------------------------------------- one run


def _run(
    params: dict[str, Any], settings: dict[str, float], steps: int, seed: int
) -> dict[str, Any]:
    """Train for `steps` steps, with a half-cosine learning rate down to 0."""
    problem = PROBLEMS[params["problem"]](params["batch_size"], seed)
    network = problem.build()
    optimizer = _optimizer(network, problem.likelihood, params["method"], settings, seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    looks = {round(steps * (point + 1) / _POINTS) for point in range(_POINTS)}
    train: list[float] = []
    validation: list[tuple[int, float, float]] = []
    seconds = 0.0
    for step, (inputs, targets) in enumerate(problem.batches(), start=1):
        begin = time.process_time()
        network.train()
        if isinstance(optimizer, FishLeg):
            optimizer.observe(inputs)
        optimizer.zero_grad()
        loss = problem.likelihood.nll(network(inputs), targets).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        seconds += time.process_time() - begin
        train.append(_finite(loss.item()))
        diverged = train[-1] == _DIVERGED
        if step in looks or diverged:
            validation.append((step, seconds, _validate(network, problem)))
        if step == steps or diverged:
            break
    return {"train": train, "validation": validation, "seconds": seconds}


def _optimizer(
    network: nn.Module,
    likelihood: Likelihood,
    method: str,
    settings: dict[str, Any],
    seed: int,
) -> torch.optim.Optimizer:
    if method in _TRACKING:
        return FishLeg(network, likelihood, seed=seed, **settings, **_TRACKING[method])
    if method == "adam":
        return torch.optim.Adam(network.parameters(), **settings)
    return torch.optim.SGD(network.parameters(), momentum=0.9, **settings)


@torch.no_grad()
def _validate(network: nn.Module, problem: Problem) -> float:
    """Return the mean loss on the validation samples."""
    network.eval()
    inputs, targets = problem.validation
    parts = zip(inputs.split(500), targets.split(500), strict=True)
    total = sum(problem.likelihood.nll(network(x), y).sum().item() for x, y in parts)
    return _finite(total / len(inputs))


def _finite(loss: float) -> float:
    """Return the loss as JSON can hold it."""
    return loss if math.isfinite(loss) else _DIVERGED


# -------------------------------------------------------------------------------- report


def report(documents: dict[str, dict[str, Any]], figures: Path) -> str:
    """Return the section's Markdown, and write `optimiser.png` into `figures`."""
    results = _results(documents)
    lines = [
        "Each method tuned by short trials on the validation loss (first seed; eight trials on the "
        "digits, six on the others), then a run of "
        "equal steps for each of n seeds (half-cosine schedule, one thread; seconds are the "
        "processor's). Loss in nats a sample, on validation data: mean ± standard deviation "
        "(n - 1). Frozen: FishLeg without its learned correction, so that Q is the damped inverse "
        "of the gradients' running second moments, at the best scale. K-FAC: the same with the "
        "running factors of K-FAC. Level: the median over the seeds of the first look at which the "
        "loss is at most Adam's last one with the same seed.",
        "",
        "| problem | method | settings | steps | n | final loss | seconds | ms a step "
        "| level with Adam: steps, seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (problem, method), result in results.items():
        settings = ", ".join(f"{key} {value:g}" for key, value in result["settings"].items())
        runs = result["runs"]
        steps, losses = runs[0]["validation"][-1][0], last_losses(result)
        seconds = fmean(run["validation"][-1][1] for run in runs)
        reached = _reached(result, results.get((problem, "adam")))
        lines.append(
            f"| {problem} | {_NAMES[method]} | {settings} | {steps} | {len(runs)} "
            f"| {show(losses, 4 - len(str(int(losses[0]))))} | {seconds:.0f} "
            f"| {1000 * seconds / steps:.0f} | {reached} |"
        )
    _draw(results, figures / "optimiser.png")
    parts = ["\n".join(lines), verdict(documents), f"![{TITLE}]({figures.name}/optimiser.png)", ""]
    return "\n\n".join(part for part in parts if part is not None)


def _results(documents: dict[str, dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (problem, method) -> result, in the order of the table."""
    found = {
        (one["params"]["problem"], one["params"]["method"]): one["result"]
        for one in documents.values()
    }
    order = [(problem, method) for problem in _METHODS for method in _NAMES]
    return {key: found[key] for key in order if key in found}


def last_losses(result: dict[str, Any]) -> list[float]:
    """Return the last validation loss of each seed's run."""
    return [run["validation"][-1][2] for run in result["runs"]]


def verdict(documents: dict[str, dict[str, Any]]) -> str:
    """Return whether the learned correction lowers the last loss."""
    results = _results(documents)
    details = []
    for problem in _METHODS:
        ours = results.get((problem, "fishleg"))
        for method in ("frozen", "kfac"):
            other = results.get((problem, method))
            if ours is None or other is None:
                continue
            one, two = last_losses(ours), last_losses(other)
            words = {"below": "lower than", "above": "higher than", "level": "not clearly unlike"}
            relation = words[order(one, two)] if len(one) > 1 else "beside"
            details.append(
                f"{problem}, {_NAMES[method]}: FishLeg's {show(one, 4)} is {relation} "
                f"{show(two, 4)} (n = {len(one)})"
            )
    if not details:
        return "No row without learning has been measured."
    return f"**Does learning help?** Last loss: {'; '.join(details)} ({CLEAR})."


def _reached(result: dict[str, Any], target: dict[str, Any] | None) -> str:
    """Return when runs were first at or below the last loss of the same seed's target run."""
    if target is None:
        return ""
    found = []
    for run, wanted in zip(result["runs"], last_losses(target), strict=True):
        looks = [(steps, seconds) for steps, seconds, loss in run["validation"] if loss <= wanted]
        found.append(looks[0] if looks else (math.inf, math.inf))
    steps, seconds = sorted(found)[len(found) // 2]
    return "not reached" if math.isinf(steps) else f"{steps}, {seconds:.0f} s"


def _draw(results: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(problem for problem, _ in results))
    figure = Figure(figsize=(9, 3.2 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), 2, squeeze=False)
    for row, problem in zip(axes, problems, strict=True):
        for column, (axis, label) in enumerate(zip(row, ("steps", "seconds"), strict=True)):
            for method, shown in _NAMES.items():
                result = results.get((problem, method))
                if result is not None:
                    _draw_runs(axis, result["runs"], column, shown)
            axis.set_xlabel(label)
            axis.set_ylabel("validation loss, nats")
            axis.set_title(problem)
            axis.set_yscale("log")
            label_decades(axis.yaxis, (1, 2, 3, 4, 6, 8))
            axis.grid(alpha=0.3)
        row[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_runs(axis: Any, runs: list[dict[str, Any]], column: int, label: str) -> None:
    """Draw the mean of the seeds' losses, with bars of one standard deviation."""
    points = list(zip(*(run["validation"] for run in runs), strict=True))
    losses = [[look[2] for look in looks] for looks in points]
    axis.errorbar(
        [fmean(look[column] for look in looks) for looks in points],
        [fmean(numbers) for numbers in losses],
        [deviation(numbers) for numbers in losses],
        marker=".",
        label=label,
    )
