"""The memory that gradients take: those of a group held together, and the passes of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fishleg.calling import model_device
from fishleg.gradients.capture import Call, recording
from fishleg.gradients.source import GradientSource


def held_bytes(source: GradientSource, name: str) -> int:
    """Return the bytes of all gradients of group `name`: s source.rows rows columns."""
    return source.rows * source.partition[name].size * source.element_size(name)


def pack_groups(
    source: GradientSource, groups: Sequence[str], budget_bytes: int
) -> list[list[str]]:
    """Pack groups, in order, so that the held gradients of each pack fit the budget.

    A group that does not fit is a pack by itself.
    """
    packs: list[list[str]] = []
    room = 0
    for name in groups:
        size = held_bytes(source, name)
        if not packs or size > room:
            packs.append([])
            room = budget_bytes
        packs[-1].append(name)
        room -= size
    return packs


def pass_bytes(source: GradientSource) -> int:
    """Return about the bytes that one batch's passes hold, found by a forward pass of one sample.

    For each of the samples that are computed at once: the tensors that autograd saves for the
    backward pass (twice, if parameters are on the general path), the gradients of the hooked
    modules' outputs, one a label, and twice the largest unfolded input; and the inputs and
    gradients of the batch before, which a loop over batches frees only when the next one exists.
    """
    fast = source.fast
    modules = {name: source.model.get_submodule(name) for name in set(fast.values())}
    saved, outputs, calls = _forward(source, modules)
    ends = {name: found[0].output_shape for name, found in calls.items()}
    inputs = sum(found[0].activation.numel() for found in calls.values())
    labels = min(source.rows_per_sample, source.batch_size)
    gradients = labels * sum(end.numel() for end in ends.values())
    unfolded = [
        ends[name][2:].numel() * module.weight[0].numel() * module.groups
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d)
    ]
    general = any(tensor not in fast for tensor in source.tensors)
    each = saved * (1 + general)
    each += outputs.element_size() * (inputs + 2 * gradients + 2 * max(unfolded, default=0))
    return source.samples_at_once * each


def _forward(
    source: GradientSource, modules: Mapping[str, nn.Module]
) -> tuple[int, Tensor, dict[str, list[Call]]]:
    """Run one sample forward; return the bytes that autograd saves, the outputs, and the calls."""
    model, network = source.model, source.network
    batch = network.prepare(next(source.calibration.batches(1, model_device(model))))
    own: set[int] = set()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # the batch may be a part of all inputs, which are not counted
            saved[storage.data_ptr()] = min(tensor.nbytes, storage.nbytes())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with source.computing(), recording(modules) as calls:
        own |= {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        with hooks:
            outputs = source.outputs(batch)
    return sum(saved.values()), outputs, calls
