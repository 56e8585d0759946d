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
from fishleg.parameters import ParameterGroup, Partition
from fishleg.parametrised import evaluate, refresh

Masks = dict[str, Tensor]


def dense_masks(partition: Partition, device: torch.device | str | None = None) -> Masks:
    """Return masks under which every weight survives."""
    return {
        group.name: torch.ones(group.shape, dtype=torch.bool, device=device)
        for group in partition.prunable
    }


@torch.no_grad()
def zero_masks(model: nn.Module, partition: Partition, *, at_least: float = 0.01) -> Masks:
    """Return the survivors by the zeros that a model's weights have already.

    A network that was pruned elsewhere carries its mask as zeros. Trained weights are hardly ever
    exactly 0; where at least a hundredth of a tensor is, all its zeros count as removed.

    Args:
        model: the module that `partition` was made from.
        partition: its groups.
        at_least: fraction of a tensor's weights that has to be exactly 0 for its zeros to count;
            none counts above 1. Zeros that a module puts there itself, as by the `weight_mask` of
            `torch.nn.utils.prune`, always count.

    Returns:
        Group name -> bool (rows, columns), on the weights' devices.
    """
    out: Masks = {}
    for group in partition.prunable:
        made = made_zeros(model, group)
        zero = made | (model.get_parameter(group.weight) == 0)
        counts = zero.double().mean() >= at_least
        removed = (zero if counts else made).reshape(group.rows, -1)
        mask = torch.ones(group.shape, dtype=torch.bool, device=removed.device)
        mask[:, : group.weight_columns] = ~removed
        out[group.name] = mask
    return out


@torch.no_grad()
def made_zeros(model: nn.Module, group: ParameterGroup) -> Tensor:
    """Return where a module makes zeros of a stored weight that is none, bool in its own shape.

    Such are the masks of `torch.nn.utils.prune`. Weights divided by norms are left out: a norm of 0
    removes no directions.
    """
    stored = model.get_parameter(group.weight)
    if group.used == group.weight or group.norm_dim is not None:
        return torch.zeros_like(stored, dtype=torch.bool)
    return (evaluate(model, group.used) == 0) & (stored != 0)


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
    for group in partition.prunable:
        if group.used != group.weight:
            refresh(model, group.used)


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
        masks: state-dict weight name (of a tied weight any) -> bool tensor, or 0/1 of any other
            dtype, of the weight's own shape. A weight left out is dense, so an empty mapping gives
            dense masks.

    Raises:
        FishLegError: a name is no prunable weight of `partition`.
        ShapeMismatch: a mask is not shaped like its weight.
    """
    first = {name: group.weight for group in partition.prunable for name in group.names}
    unknown = sorted(set(masks) - set(first))
    if unknown:
        raise FishLegError(f"weight masks: {unknown} name no prunable weight of the model.")
    device = next((mask.device for mask in masks.values()), None)
    given = {first[name]: mask for name, mask in masks.items()}
    out = dense_masks(partition, device)
    for group in partition.prunable:
        if group.weight not in given:
            continue
        mask = given[group.weight]
        if tuple(mask.shape) != group.weight_shape:
            raise ShapeMismatch(
                f"mask of {group.weight}: expected {group.weight_shape}, got {tuple(mask.shape)}."
            )
        out[group.name][:, : group.weight_columns] = mask.reshape(group.rows, -1).bool()
    return out
