"""How good a classifier is on a split: accuracy and calibration error in percent, loss in nats.

Numbers that are not finite have no largest one: a network that gives them is not measured, but is
an error with the sample's number. A class may be ruled out by a logit of -inf, a label may not.
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
    """Says which sample a network gives nan or infinity for."""


def require_classifier(network: nn.Module, dataset: DataSet) -> None:
    """Let the network classify two samples, so that what does not fit is said at once.

    Args:
        network: on any device; nothing of it changes.
        dataset: the first two validation samples are shown, in eval mode.

    Raises:
        StageError: it cannot take them, or has not an output for each class.
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
    """Return accuracy (%), nll (nats) and ece (%) of a network on a split.

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
    right = (predicted == labels).double()
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64, device=logits.device)
    gaps = gaps.index_add(0, bins, right - confidence)
    return {
        "accuracy": 100 * right.mean().item(),
        "nll": functional.cross_entropy(logits, labels).item(),
        "ece": 100 * gaps.abs().sum().item() / len(labels),
    }


def log_validation(ctx: Context, network: nn.Module, dataset: DataSet) -> dict[str, float]:
    """Report a stage's result on the validation split as its final metrics, and return it."""
    found = measure(network, dataset, dataset.validation)
    ctx.log({f"validation/{name}": value for name, value in found.items()})
    return found


def low_accuracy(facts: Facts, accuracy: float, split: str) -> list[str]:
    """Return the warning about a pruned model that has lost half of its accuracy, if it has.

    Args:
        facts: the model's.
        accuracy: of it, in percent.
        split: on which split; the dense network's is compared on it, or else on validation.
    """
    dense = facts.dense_accuracy_on(split)
    if facts.target == 0 or dense is None or accuracy >= dense / 2:
        return []
    return [
        f"The accuracy on the {split} split, {accuracy:.2f} %, is less than half of what the dense "
        f"network had, {dense:.2f} %."
    ]


def accuracy_text(accuracies: Mapping[str, float]) -> str:
    """Return split -> accuracy in percent as text: "91.43 % on the test split, ..."."""
    return ", ".join(f"{one:.2f} % on the {split} split" for split, one in accuracies.items())
