"""Checks of a partition against the model whose gradients are wanted."""

from __future__ import annotations

from torch import nn

from fishleg.errors import FishLegError, ShapeMismatch, UnknownName
from fishleg.parameters import Partition


def check_partition(model: nn.Module, partition: Partition) -> None:
    """Check that a partition has groups, and that they are the model's.

    Raises:
        FishLegError: there is no group, or one has no values, or none of real numbers.
        UnknownName: the model has no such parameter.
        ShapeMismatch: a parameter has another shape.
    """
    if not partition.groups:
        why = "; ".join(f"{name}: {reason}" for name, reason in partition.uncovered[:5])
        raise FishLegError(
            "partition: expected at least one parameter to take gradients by, got none "
            f"({why or 'the model has no parameters'}); give the model trainable parameters "
            "(requires_grad_(True)), and do not skip them all."
        )
    parameters = dict(model.named_parameters())
    for group in partition.groups:
        for name in group.tensors:
            if name not in parameters:
                raise UnknownName("parameter", name, parameters)
            _check_values(name, parameters[name])
        shape = tuple(parameters[group.weight].shape)
        if shape != group.weight_shape:
            raise ShapeMismatch(
                f"{group.weight}: expected {group.weight_shape} as in the partition, got {shape}."
            )


def _check_values(name: str, parameter: nn.Parameter) -> None:
    """Check that a parameter has values that take gradients.

    Raises:
        FishLegError: it has not.
    """
    if parameter.is_meta:
        raise FishLegError(
            f"{name}: expected values, got none (device meta); load the model's weights."
        )
    if parameter.is_inference():
        raise FishLegError(
            f"{name}: expected a parameter that takes gradients, got one that was made "
            "under torch.inference_mode(); make or load the model outside it."
        )
    if not parameter.is_floating_point():
        raise FishLegError(
            f"{name}: expected real numbers, got {parameter.dtype}; leave it out with "
            f"partition_parameters(skip=[{name!r}])."
        )
