"""Measures of a classifier on a split: accuracy and calibration error in percent, loss in nats.

A network whose outputs are not finite has no accuracy; it is an error with the sample's number. A
logit of -inf may rule out a class, but not a sample's label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.stage import Context, StageError
from stages.data.dataset import DataSet, Split

if TYPE_CHECKING:
    from stages.model_folder import Facts

_BINS = 15


class NotFinite(StageError):
    """A network gives nan or infinity for a sample."""


def require_classifier(network: nn.Module, dataset: DataSet) -> None:
    """Let the network classify two samples, so that a misfit is an error before any training.

    Args:
        network: on any device; it stays as it is.
        dataset: its first two validation samples are classified, in eval mode.

    Raises:
        StageError: the network cannot take them, or lacks an output for a class.
    """
    shown = dataset.validation.take(torch.arange(min(2, len(dataset.validation))))
    inputs = dataset.normalise(shown.inputs)
    described = f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape)}"
    try:
        with torch.random.fork_rng(devices=[]):
            outputs = classify(network, dataset, shown, batch_size=2)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise StageError(
            f"the network cannot classify samples of the data set, {described}: {error}. See "
            "model, model_args and dataset_args."
        ) from error
    if outputs.ndim != 2 or outputs.shape[1] < dataset.num_classes:
        raise StageError(
            f"the network makes {tuple(outputs.shape)} of samples {described}; expected (samples, "
            f"classes), with the data set's {dataset.num_classes} classes."
        )


def classify(network: nn.Module, dataset: DataSet, split: Split, batch_size: int) -> Tensor:
    """Return logits (N, classes), float32 on the network's device, in eval mode."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        logits = [
            network(dataset.normalise(batch.to(device))).float()
            for batch in split.inputs.split(batch_size)
        ]
    network.train(was_training)
    return torch.cat(logits)


def measure(
    network: nn.Module, dataset: DataSet, split: Split, batch_size: int = 500
) -> dict[str, float]:
    """Return accuracy (%), nll (nats) and ece (%) of a network on a split; see `measure_each`."""
    return measure_each(network, dataset, split, batch_size)[0]


def measure_each(
    network: nn.Module, dataset: DataSet, split: Split, batch_size: int = 500
) -> tuple[dict[str, float], Tensor]:
    """Return accuracy (%), nll (nats) and ece (%), and which samples are right, (N,) bool, CPU.

    ece is the expected calibration error over 15 equal bins of confidence (C. Guo et al., On
    Calibration of Modern Neural Networks, 2017, eq. 5).

    Raises:
        NotFinite: the network gives nan or infinity for a sample.
    """
    logits = classify(network, dataset, split, batch_size).double()
    labels = split.labels.to(logits.device)
    strange = ~logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).isfinite().squeeze(-1)
    if strange.any():
        raise NotFinite(
            f"the network's outputs are not finite (nan or infinity) for {int(strange.sum()):,} of "
            f"{len(logits):,} samples, the first of them number {int(strange.nonzero()[0])}; it "
            "has no accuracy. Prune less, or look for weights that have become too large."
        )
    confidence, predicted = logits.softmax(-1).max(-1)
    flags = predicted == labels
    right = flags.double()
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64, device=logits.device)
    gaps = gaps.index_add(0, bins, right - confidence)
    numbers = {
        "accuracy": 100 * right.mean().item(),
        "nll": functional.cross_entropy(logits, labels).item(),
        "ece": 100 * gaps.abs().sum().item() / len(labels),
    }
    return numbers, flags.cpu()


def log_validation(ctx: Context, network: nn.Module, dataset: DataSet) -> dict[str, float]:
    """Measure a stage's network on validation; log the result as final metrics, and return it."""
    found = measure(network, dataset, dataset.validation)
    ctx.log({f"validation/{name}": value for name, value in found.items()})
    return found


def low_accuracy(facts: Facts, accuracy: float, split: str) -> list[str]:
    """Return a warning if a pruned model has less than half of the dense network's accuracy.

    Args:
        facts: the model's.
        accuracy: the model's, in percent.
        split: the split that was measured; the dense network's accuracy is the one on it, or else
            on validation.
    """
    dense = facts.dense_accuracy_on(split)
    if facts.target == 0 or dense is None or accuracy >= dense / 2:
        return []
    return [
        f"The accuracy on the {split} split, {accuracy:.2f} %, is less than half of the dense "
        f"network's, {dense:.2f} %."
    ]


def accuracy_text(accuracies: Mapping[str, float]) -> str:
    """Return split -> accuracy in percent as text: "91.43 % on the test split, ..."."""
    return ", ".join(f"{one:.2f} % on the {split} split" for split, one in accuracies.items())
