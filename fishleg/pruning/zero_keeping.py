"""Zeros that stay zero while a user's own loop trains the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fishleg.checks import check_type
from fishleg.errors import FishLegError
from fishleg.parameters import partition_parameters
from fishleg.pruning.masks import HeldMasks, count_masks, weight_masks, zero_masks


def keep_zeros(
    optimizer: Optimizer, model: nn.Module, *, also_prune: Sequence[str] = ()
) -> RemovableHandle:
    """Keep the zeros that the prunable weights have now, after each step of an optimiser.

    The zeros survive momentum, weight decay and adaptive steps, since they are restored after
    every `optimizer.step()`. Weights that become 0 later are not kept.

    Args:
        optimizer: it moves the weights of `model`.
        model: a pruned network; its parameters may move afterwards, not be replaced.
        also_prune: names, or `fnmatch` patterns, of the weights that were prunable on request;
            see `fishleg.prune`.

    Returns:
        A handle; its `remove()` lets the zeros train again.

    Raises:
        FishLegError: no prunable weight is 0, or the optimiser moves none that has zeros.

    Cost: one pass over the weights that have zeros, a step.
    """
    check_type("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
    partition = partition_parameters(model, prunable=also_prune)
    masks = zero_masks(model, partition, at_least=0.0)
    if not count_masks(partition, masks)[0]:
        raise FishLegError(
            "keep_zeros: expected zeros among the prunable weights, got none; prune the model "
            "first, and name in also_prune the weights that were prunable on request."
        )
    wanted = {name: mask for name, mask in weight_masks(partition, masks).items() if not mask.all()}
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(model.get_parameter(name)) in moved for name in wanted):
        raise FishLegError(
            "keep_zeros: expected an optimiser of the model's own parameters, got one that moves "
            f"no weight with zeros ({', '.join(list(wanted)[:3])}); make it from "
            "model.parameters()."
        )
    held = HeldMasks(model, wanted)

    def put_back(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held.apply()

    return optimizer.register_step_post_hook(put_back)
