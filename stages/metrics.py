"""How good a classifier is on a split: accuracy and calibration error in percent, loss in nats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.stage import Context
from stages.data.dataset import DataSet, Split

_BINS = 15


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
    """
    logits = classify(network, dataset, split, batch_size).double()
    labels = split.labels.to(logits.device)
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


def accuracy_text(accuracies: Mapping[str, float]) -> str:
    """Return split -> accuracy in percent as text: "91.43 % on the test split, ..."."""
    return ", ".join(f"{one:.2f} % on the {split} split" for split, one in accuracies.items())
