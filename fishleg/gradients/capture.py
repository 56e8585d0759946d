"""The inputs of modules and the gradients of their outputs, captured by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class Call:
    """One call of a module: its input, and where autograd has the gradient of its output.

    The edge is taken before an in-place operation can change the output.
    """

    activation: Tensor
    edge: GradientEdge
    output_shape: torch.Size


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Record the calls of `modules` while the block runs; yields module name -> calls in order.

    Calls whose output is no tensor, or has no gradient, are left out.
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            activation = args[0] if args else kwargs["input"]
            if isinstance(output, Tensor) and output.requires_grad:
                edge = get_gradient_edge(output)
                calls[name].append(Call(activation.detach(), edge, output.shape))

        return hook

    handles = [
        # before hooks of others, which may return another output
        module.register_forward_hook(hook_for(name), with_kwargs=True, prepend=True)
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(calls: Sequence[Call], losses: Sequence[Tensor]) -> list[Tensor]:
    """Return for each call d loss / d output, (n, D, ...), the D scalar losses in dimension 1.

    The graph is kept. Cost: D backward passes without weight gradients, about one forward each.
    """
    edges = [call.edge for call in calls]
    by_loss = [
        torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        for loss in losses
        if edges
    ]
    return [
        _stack(gradients, call.output_shape, losses[0])
        for call, gradients in zip(calls, zip(*by_loss, strict=True), strict=True)
    ]


def _stack(gradients: Sequence[Tensor | None], shape: torch.Size, like: Tensor) -> Tensor:
    """Stack in dimension 1, with None as zeros; without a copy where there is only one."""
    full = [like.new_zeros(shape) if g is None else g for g in gradients]
    return full[0].unsqueeze(1) if len(full) == 1 else torch.stack(full, dim=1)
