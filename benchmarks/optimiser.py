"""The FishLeg optimiser against SGD with momentum and Adam: loss against steps and against seconds.

Two problems: the MNIST autoencoder 784-1000-500-250-30 and back (Hinton and Salakhutdinov, 2006),
and ResNet20 on CIFAR-10 from fresh weights. Each method is tuned with the same effort, six short
trials chosen by the validation loss; then one longer run of equal steps. The test set is not read.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._seeds import label_decades
from fishleg.likelihoods import Bernoulli, Categorical, Likelihood
from fishleg.optim import FishLeg
from pipeline.stage import write_json
from stages.data.batches import training_batches
from stages.data.cifar import load_cifar10
from stages.data.mnist import load_mnist
from stages.models.resnet_cifar import resnet20

TITLE = "The optimiser: loss against steps and seconds"

_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
_STEPS = {"autoencoder": (300, 1500), "resnet20": (100, 400)}  # of a trial, of the final run
_BATCH = {"autoencoder": 500, "resnet20": 64}
_DIVERGED = 1e9  # replaces a loss that is not finite
_POINTS = 12  # evaluations of the validation loss in a run
_RATES = {
    ("autoencoder", "sgd"): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ("autoencoder", "adam"): (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("resnet20", "sgd"): (1e-2, 3e-2, 1e-1, 2e-1, 5e-1, 1.0),
    ("resnet20", "adam"): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
_DAMPINGS = {"autoencoder": (0.01, 0.03, 0.1), "resnet20": (0.003, 0.01, 0.03)}
_TRUSTS = {"autoencoder": (0.1, 0.3), "resnet20": (0.03, 0.1)}
_NAMES = {"sgd": "SGD, momentum 0.9", "adam": "Adam", "fishleg": "FishLeg"}


def cells() -> dict[str, dict[str, Any]]:
    """Return cell name -> parameters: a grid of six trials for each problem and method."""
    return {
        f"{problem}/{method}": {
            "problem": problem,
            "method": method,
            "grid": _grid(problem, method),
            "trial_steps": _STEPS[problem][0],
            "steps": _STEPS[problem][1],
            "batch_size": _BATCH[problem],
            "seed": 0,
        }
        for problem in _STEPS
        for method in _NAMES
    }


def _grid(problem: str, method: str) -> list[dict[str, float]]:
    if method != "fishleg":
        return [{"lr": rate} for rate in _RATES[problem, method]]
    return [
        {"lr": 0.3, "damping": damping, "trust": trust}
        for damping in _DAMPINGS[problem]
        for trust in _TRUSTS[problem]
    ]


def run_cell(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the trials and the final run of one cell; finished ones are read from `folder`.

    Returns:
        `trials`: settings and last validation loss; `settings`: the best; `train`: loss of every
        step's batch; `validation`: [step, seconds of training, loss]; `seconds`: of the final run.
        Seconds are the processor's.
    """
    problem = _PROBLEMS[params["problem"]](params)
    trials = []
    for number, settings in enumerate(params["grid"]):
        found = _kept(
            folder / f"trial-{number}.json",
            partial(_run, problem, params, settings, params["trial_steps"]),
        )
        trials.append({"settings": settings, "validation": found["validation"][-1][2]})
    best = min(trials, key=lambda trial: trial["validation"])["settings"]
    final = _kept(folder / "final.json", partial(_run, problem, params, best, params["steps"]))
    return {"trials": trials, "settings": best, **final}


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text("utf-8"))


# -------------------------------------------------------------------------------- problems


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A network to train, with its data.

    Attributes:
        build: makes the network with its first weights.
        likelihood: whose batch mean is the loss.
        batches: endless (inputs, targets).
        validation: (inputs, targets).
    """

    build: Callable[[], nn.Module]
    likelihood: Likelihood
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    validation: tuple[Tensor, Tensor]


def _autoencoder(params: dict[str, Any]) -> Problem:
    data = load_mnist(_data_folder())
    images, held = (
        (split.inputs.float() / 255).flatten(1) for split in (data.train, data.validation)
    )

    def build() -> nn.Module:
        torch.manual_seed(params["seed"])
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(_WIDTHS):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(params["seed"])
        while True:
            chosen = images[torch.randint(len(images), (params["batch_size"],), generator=draw)]
            yield chosen, chosen

    return Problem(build=build, likelihood=Bernoulli(), batches=batches, validation=(held, held))


def _resnet20(params: dict[str, Any]) -> Problem:
    data = load_cifar10(_data_folder())
    held = data.validation.take(torch.arange(0, len(data.validation), 5))

    def build() -> nn.Module:
        torch.manual_seed(params["seed"])
        return resnet20(data.num_classes)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            yield from training_batches(
                data, batch_size=params["batch_size"], seed=params["seed"], epoch=epoch
            )
            epoch += 1

    return Problem(
        build=build,
        likelihood=Categorical(),
        batches=batches,
        validation=(data.normalise(held.inputs), held.labels),
    )


_PROBLEMS = {"autoencoder": _autoencoder, "resnet20": _resnet20}


def _data_folder() -> Path:
    return Path(os.environ.get("FISHLEG_DATA", "data"))


# -------------------------------------------------------------------------------- one run


def _run(
    problem: Problem, params: dict[str, Any], settings: dict[str, float], steps: int
) -> dict[str, Any]:
    """Train for `steps` steps, with a half-cosine learning rate down to 0."""
    network = problem.build()
    optimizer = _optimizer(network, problem.likelihood, params, settings)
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
    network: nn.Module, likelihood: Likelihood, params: dict[str, Any], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    if params["method"] == "fishleg":
        return FishLeg(network, likelihood, seed=params["seed"], **settings)
    if params["method"] == "adam":
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
    results = {name: document["result"] for name, document in documents.items()}
    lines = [
        "Each method tuned by six short trials on the validation loss, then one run of equal steps "
        "(half-cosine schedule, one seed, one thread; seconds are the processor's). Loss in nats a "
        "sample, on validation data.",
        "",
        "| problem | method | settings | steps | final loss | seconds | ms a step "
        "| steps, seconds to Adam's final loss |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        problem, _, method = name.partition("/")
        settings = ", ".join(f"{key} {value:g}" for key, value in result["settings"].items())
        steps, seconds, loss = result["validation"][-1]
        lines.append(
            f"| {problem} | {_NAMES[method]} | {settings} | {steps} | {loss:.4g} | {seconds:.0f} "
            f"| {1000 * seconds / steps:.0f} | {_reached(result, results.get(f'{problem}/adam'))} |"
        )
    _draw(results, figures / "optimiser.png")
    return "\n".join([*lines, "", f"![{TITLE}]({figures.name}/optimiser.png)", ""])


def _reached(result: dict[str, Any], target: dict[str, Any] | None) -> str:
    """Return when a run was first at or below another's last validation loss."""
    if target is None:
        return ""
    wanted = target["validation"][-1][2]
    for steps, seconds, loss in result["validation"]:
        if loss <= wanted:
            return f"{steps}, {seconds:.0f} s"
    return "not reached"


def _draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(name.partition("/")[0] for name in results))
    figure = Figure(figsize=(9, 3.2 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), 2, squeeze=False)
    for row, problem in zip(axes, problems, strict=True):
        for column, (axis, label) in enumerate(zip(row, ("steps", "seconds"), strict=True)):
            for method, shown in _NAMES.items():
                result = results.get(f"{problem}/{method}")
                if result is not None:
                    points = result["validation"]
                    axis.plot(
                        [point[column] for point in points],
                        [point[2] for point in points],
                        marker=".",
                        label=shown,
                    )
            axis.set_xlabel(label)
            axis.set_ylabel("validation loss, nats")
            axis.set_title(problem)
            axis.set_yscale("log")
            label_decades(axis.yaxis, (1, 2, 3, 4, 6, 8))
            axis.grid(alpha=0.3)
        row[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
