"""Masks: which weights survive.

A mask is a bool matrix (rows, columns) a prunable group, True for survivors, the bias column always
True; `Masks` maps group name -> mask and holds the prunable groups only, in state-dict order.
For saving and for training the same masks are kept by weight: state-dict name of the weight -> bool
tensor of the weight's own shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishleg.errors import FishLegError, ShapeMismatch
from fishleg.parameters import ParameterGroup, Partition, parameters_like, used_weight
from fishleg.parametrised import find_parametrised, refresh

Masks = dict[str, Tensor]


def dense_masks(partition: Partition, device: torch.device | str | None = None) -> Masks:
    """Return masks under which every weight survives."""
    return {
        group.name: torch.ones(group.shape, dtype=torch.bool, device=device)
        for group in partition.prunable
    }


@torch.no_grad()
def zero_masks(model: nn.Module, partition: Partition, *, at_least: float = 0.01) -> Masks:
    """Return the survivors by the present zeros of a model's weights.

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
    """Return where a module makes zeros of nonzero stored weights, bool in the weight's shape.

    Such are the masks of `torch.nn.utils.prune`, and weight-normalised rows of norm 0.
    """
    stored = model.get_parameter(group.weight)
    if group.used == group.weight:
        return torch.zeros_like(stored, dtype=torch.bool)
    return (used_weight(model, group) == 0) & (stored != 0)


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
    """Return the numbers of removed and of prunable weights, without biases.

    Errors are those of `check_masks`.
    """
    check_masks(partition, masks)
    removed = sum(int((~masks[group.name]).sum()) for group in partition.prunable)
    prunable = sum(group.rows * group.weight_columns for group in partition.prunable)
    return removed, prunable


def apply_masks(model: nn.Module, partition: Partition, masks: Mapping[str, Tensor]) -> None:
    """Set every removed weight of `model` to exactly 0, in place.

    Errors are those of `check_masks` and `parameters_like`.

    Args:
        model: the module that `partition` was made from.
        partition: its groups.
        masks: group name -> bool (rows, columns).
    """
    wanted = weight_masks(partition, masks)
    parameters_like(model, wanted)
    HeldMasks(model, wanted).apply()


class HeldMasks:
    """Masks that are applied again whenever the weights have moved, as after an optimiser's step.

    A weight that is removed is 0 where the forward pass reads it. Where a weight-normalised slice
    loses all its weights, its norm becomes 0, and its directions 1: 0 / 0 would be no number.

    Args:
        model: has the weights; parameters may move afterwards, not be replaced.
        masks: state-dict weight name -> bool in the weight's own shape, True for survivors.

    Attributes:
        removed: state-dict weight name -> bool in the weight's own shape, True for removed ones.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        self.removed = {name: ~mask for name, mask in masks.items()}
        self._model = model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._weights = [parameters[name] for name in masks]
        self._made = [
            one for one in (find_parametrised(model) if masks else ()) if one.stored in masks
        ]

    @torch.no_grad()
    def apply(self) -> None:
        """Apply the masks again. Cost: one pass over the weights that have one."""
        for weight, removed in zip(self._weights, self.removed.values(), strict=True):
            weight.masked_fill_(removed.to(weight.device), 0.0)
        for one in self._made:
            if one.stored is not None and one.norms is not None:
                weight = self._model.get_parameter(one.stored)
                norms = self._model.get_parameter(one.norms)
                empty = _along(norms.shape, self.removed[one.stored].to(weight.device))
                weight.masked_fill_(empty, 1.0)
                norms.masked_fill_(empty, 0.0)
            refresh(self._model, one.used)


def _along(shape: torch.Size, removed: Tensor) -> Tensor:
    """Return where all weights that share a norm are removed, in the norms' `shape`."""
    for dim, size in enumerate(shape):
        if size == 1:
            removed = removed.all(dim, keepdim=True)
    return removed if shape else removed.all()


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
        FishLegError: a name is no prunable weight of `partition`, or two names of one weight have
            different masks.
        ShapeMismatch: a mask is not shaped like its weight.
    """
    first = {name: group.weight for group in partition.prunable for name in group.names}
    unknown = sorted(set(masks) - set(first))
    if unknown:
        raise FishLegError(f"weight masks: {unknown} name no prunable weight of the model.")
    device = next((mask.device for mask in masks.values()), None)
    given: dict[str, Tensor] = {}
    for name, mask in masks.items():
        other = given.setdefault(first[name], mask)
        if other is not mask and not torch.equal(other, mask):
            raise FishLegError(
                f"weight masks: {name} is another name of {first[name]}, and has another mask; "
                "give one of them."
            )
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
