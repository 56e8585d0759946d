"""The signals of a group's layer in one batch, from which its gradients are products."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fishleg.errors import FishLegError
from fishleg.gradients.layers import LayerSignals, has_signals, layer_signals
from fishleg.gradients.lazy import Lazy
from fishleg.gradients.persample import Pass
from fishleg.parameters import ParameterGroup, Partition


def signalling_module(
    model: nn.Module, group: ParameterGroup, fast: Mapping[str, str]
) -> str | None:
    """Return the linear or convolution module whose weight (and bias) a group is, or None.

    Args:
        model: the network.
        group: one of its groups.
        fast: parameter name -> hooked module, of the fast path.
    """
    modules = {fast.get(tensor) for tensor in group.tensors}
    module = modules.pop()
    if modules or module is None or not group.weight.endswith("weight"):
        return None
    return module if has_signals(model.get_submodule(module)) else None


def lazy_signals(
    model: nn.Module, partition: Partition, modules: Mapping[str, str | None], one: Pass
) -> Mapping[str, LayerSignals | None]:
    """Return group name -> signals in one batch; None for a group without a module."""

    def make(name: str) -> LayerSignals | None:
        module = modules[name]
        if module is None:
            return None
        return layer_signals(
            model.get_submodule(module),
            one.inputs[module],
            one.gradients[module],
            bias=partition[name].bias is not None,
        )

    return Lazy(list(modules), make)


def is_outer_product(
    model: nn.Module, group: ParameterGroup, module: str | None, one: Pass
) -> bool:
    """Tell whether a group's gradients in a batch have rank one: a linear layer at one position."""
    return (
        module is not None
        and one.fast.issuperset(group.tensors)
        and isinstance(model.get_submodule(module), nn.Linear)
        and one.inputs[module].ndim == 2
    )


def check_signals(group: ParameterGroup, one: Pass, fast: dict[str, str]) -> None:
    """Check that a group's layer determines all of its gradient in a batch.

    Otherwise its parameters leave `fast`.

    Raises:
        FishLegError: it does not.
    """
    if one.fast.issuperset(group.tensors):
        return
    for tensor in group.tensors:
        fast.pop(tensor, None)
    first, last = int(one.batch.indices[0]), int(one.batch.indices[-1])
    raise FishLegError(
        f"{group.weight}: in samples {first} to {last} the model also uses it outside the one call "
        "of its layer, unlike before, so the layer's signals do not give all of its gradient. "
        "Expected a model whose structure does not depend on the data. Fit again: the gradients of "
        "this weight now take the general path."
    )
