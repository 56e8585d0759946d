"""Masks: which weights survive.

A mask is a bool matrix (rows, columns) a prunable group, True for survivors, the bias column always
True; `Masks` maps group name -> mask and holds the prunable groups only, in state-dict order.
For saving and for training the same facts are kept a weight tensor: state-dict name of the weight
-> bool tensor of the weight's own shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishleg.errors import FishLegError, ShapeMismatch
from fishleg.parameters import Partition

Masks = dict[str, Tensor]


def dense_masks(partition: Partition, device: torch.device | str | None = None) -> Masks:
    """Return masks under which every weight survives."""
    return {
        group.name: torch.ones(group.shape, dtype=torch.bool, device=device)
        for group in partition.prunable
    }


def check_masks(partition: Partition, masks: Mapping[str, Tensor]) -> None:
    """Check that `masks` are masks of `partition`.

    Raises:
        FishLegError: groups are missing or not prunable, or a bias column holds False.
        ShapeMismatch: a mask is not bool or not (rows, columns).
    """
    expected = {group.name for group in partition.prunable}
    if set(masks) != expected:
        raise FishLegError(
            "masks: expected one for each prunable group; missing "
            f"{sorted(expected - set(masks))}, not prunable {sorted(set(masks) - expected)}. "
            "Start from dense_masks(partition)."
        )
    for group in partition.prunable:
        mask = masks[group.name]
        if mask.dtype != torch.bool or tuple(mask.shape) != group.shape:
            raise ShapeMismatch(
                f"mask of {group.name}: expected bool {group.shape}, "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        if not mask[:, group.weight_columns :].all():
            raise FishLegError(
                f"mask of {group.name}: expected True all down the bias column (biases are never "
                "removed), got False; see group_masks."
            )


def count_masks(partition: Partition, masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (removed, prunable): how many weights are removed, and of how many (no biases)."""
    removed = sum(int((~masks[group.name]).sum()) for group in partition.prunable)
    prunable = sum(group.rows * group.weight_columns for group in partition.prunable)
    return removed, prunable


@torch.no_grad()
def apply_masks(model: nn.Module, partition: Partition, masks: Mapping[str, Tensor]) -> None:
    """Set every removed weight of `model` to exactly 0, in place; errors as `check_masks`.

    Args:
        model: the module that `partition` was made from.
        partition: its groups.
        masks: group name -> bool (rows, columns).
    """
    parameters = dict(model.named_parameters())
    for name, mask in weight_masks(partition, masks).items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


def weight_masks(partition: Partition, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return state-dict weight name -> bool of the weight's own shape; errors as `check_masks`."""
    check_masks(partition, masks)
    return {
        group.weight: masks[group.name][:, : group.weight_columns].reshape(group.weight_shape)
        for group in partition.prunable
    }


def group_masks(partition: Partition, masks: Mapping[str, Tensor]) -> Masks:
    """Return group masks from weight masks: `weight_masks` undone.

    Args:
        partition: the groups.
        masks: state-dict weight name -> bool tensor, or 0/1 of any other dtype, of the weight's own
            shape. A weight left out is dense, so an empty mapping gives dense masks.

    Raises:
        FishLegError: a name is no prunable weight of `partition`.
        ShapeMismatch: a mask is not shaped like its weight.
    """
    unknown = sorted(set(masks) - {group.weight for group in partition.prunable})
    if unknown:
        raise FishLegError(f"weight masks: {unknown} name no prunable weight of the model.")
    device = next((mask.device for mask in masks.values()), None)
    out = dense_masks(partition, device)
    for group in partition.prunable:
        if group.weight not in masks:
            continue
        mask = masks[group.weight]
        if tuple(mask.shape) != group.weight_shape:
            raise ShapeMismatch(
                f"mask of {group.weight}: expected {group.weight_shape}, got {tuple(mask.shape)}."
            )
        out[group.name][:, : group.weight_columns] = mask.reshape(group.rows, -1).bool()
    return out
