"""A model's parameters: their names, and the weight of which layer each is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from fishleg.errors import FishLegError
from fishleg.parametrised import Parametrised, find_parametrised

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, kw_only=True)
class WeightTensor:
    """One parameter of a model, as `find_tensors` found it.

    Attributes:
        names: all its state-dict names, in state-dict order.
        uses: the tensors that forward passes read, one for each name: that name, or the weight that
            a parametrization makes of it.
        shape: its shape.
        trainable: `requires_grad`.
        unusual: why it is not pruned by default, or None if it is.
        zeros_lost: why zeros in it are no zeros in the forward pass, or None.
        norm_dim: of slices that must keep a nonzero weight; see `ParameterGroup`.
        transposed: its first dimension is the inputs'.
        conv_groups: convolution groups of a transposed weight, else 1.
    """

    names: tuple[str, ...]
    uses: tuple[str, ...]
    shape: tuple[int, ...]
    trainable: bool
    unusual: str | None
    zeros_lost: str | None
    norm_dim: int | None
    transposed: bool
    conv_groups: int

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def aliases(self) -> tuple[str, ...]:
        """All its names, and those of the weights that it makes."""
        return tuple(dict.fromkeys((*self.names, *self.uses)))

    def matches(self, patterns: Iterable[str]) -> bool:
        """Tell whether one of the names, or `fnmatch` patterns, matches it."""
        return any(
            alias == pattern or fnmatchcase(alias, pattern)
            for pattern in patterns
            for alias in self.aliases
        )


def find_tensors(model: nn.Module) -> list[WeightTensor]:
    """Return the parameters of a model, each once, in state-dict order.

    Raises:
        FishLegError: a lazy parameter has no shape yet.
    """
    made = find_parametrised(model)
    stored = {one.stored: one for one in made if one.stored is not None}
    parts = {part: one for one in made for part in one.parts if part != one.stored}
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise FishLegError(
                f"{name} has no shape yet, as a parameter of a lazy layer; run the model once on "
                "a sample before anything else."
            )
        names.setdefault(parameter, []).append(name)
    out = []
    for parameter, found in names.items():
        uses = [stored[name].used if name in stored else name for name in found]
        module, _ = _owner(uses[0], modules)
        transposed = isinstance(module, _TRANSPOSED)
        out.append(
            WeightTensor(
                names=tuple(found),
                uses=tuple(uses),
                shape=tuple(parameter.shape),
                trainable=parameter.requires_grad,
                unusual=_why_unusual(uses, modules),
                zeros_lost=next((_why_lost(parts[name]) for name in found if name in parts), None),
                norm_dim=next(
                    (
                        stored[name].norm_dim
                        for name in found
                        if name in stored and stored[name].norms is None
                    ),
                    None,
                ),
                transposed=transposed,
                conv_groups=module.groups if isinstance(module, _TRANSPOSED) else 1,
            )
        )
    return out


def _owner(use: str, modules: dict[str, nn.Module]) -> tuple[nn.Module, str]:
    prefix, _, leaf = use.rpartition(".")
    return modules[prefix], leaf


def _why_unusual(uses: list[str], modules: dict[str, nn.Module]) -> str | None:
    """Return why a parameter is not pruned by default, by the layers that have it."""
    owners = {use: _owner(use, modules) for use in uses}
    for use, (module, leaf) in owners.items():
        if isinstance(module, _EMBEDDINGS) and leaf == "weight":
            return "an embedding" if use == uses[0] else f"tied to the embedding {use}"
    if any(_is_usual(module, leaf) for module, leaf in owners.values()):
        return None
    module, leaf = owners[uses[0]]
    return f"{leaf} of {type(module).__name__}, no weight of a known layer"


def _is_usual(module: nn.Module, leaf: str) -> bool:
    """Tell whether `leaf` of a module is a weight that is pruned by default."""
    if isinstance(module, _PLAIN):
        return leaf == "weight"
    if isinstance(module, _RECURRENT):
        return leaf.startswith("weight_")
    return isinstance(module, nn.MultiheadAttention) and leaf in _ATTENTION


def _why_lost(made: Parametrised) -> str:
    if made.stored is None:
        return f"makes {made.used} by {made.by}, where its zeros do not stay zeros in their places"
    return f"makes {made.used} by {made.by}, whose zeros are those of {made.stored}"
