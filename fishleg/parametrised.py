"""Weights that a module makes of other tensors, and the stored tensors that share their zeros.

A weight-normalised layer has no parameter `weight`: it has norms g and directions v, and uses
w = g v / ||v||. Prunable is the stored tensor whose zeros are zeros of the used one, at the same
places: v here. For torch's own types it is known; for others a trial on random numbers finds it,
and a weight that fails is not prunable.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fishleg.modes import evaluating

WHOLE = -1
"""In place of a dimension: the whole tensor (as in `torch.norm_except_dim`)."""

_Hook = WeightNorm | SpectralNorm | prune.BasePruningMethod
_TRIALS = 4


@dataclass(frozen=True, kw_only=True)
class Parametrised:
    """A weight that is made of other tensors.

    Attributes:
        used: the weight as the forward pass reads it, such as `fc.weight`.
        parts: names of the parameters that it is made of.
        stored: the one of them whose zeros are zeros of the used weight at the same places, or
            None where there is none.
        by: name of the parametrization, for messages.
        norm_dim: the stored tensor is divided by the norm of each slice along this dimension, and
            0 / 0 is no number; `WHOLE`; or None where nothing is divided by.
        norms: the part that multiplies the slices again, w = norms * stored / ||stored||, or None
            where there is no such part.
    """

    used: str
    parts: tuple[str, ...]
    stored: str | None
    by: str
    norm_dim: int | None = None
    norms: str | None = None


def find_parametrised(model: nn.Module) -> list[Parametrised]:
    """Return the parametrised weights of a model, in module order, under all their names.

    Known are `torch.nn.utils.parametrizations.weight_norm` and `spectral_norm`, the older hooks of
    the same names, and `torch.nn.utils.prune`. Any other parametrization is tried four times on
    random numbers with random zeros for each stored tensor in turn, and the zeros have to keep
    their places. Neither the model nor torch's generator changes.

    Cost: for an unknown one about ten evaluations.
    """
    found = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        stem = f"{prefix}." if prefix else ""
        for leaf, chain in _chains(module):
            found.append(_describe_chain(stem, leaf, chain))
        for hook in _hooks(module):
            found.append(_describe_hook(stem, hook))
    return found


@torch.no_grad()
def evaluate(model: nn.Module, used: str) -> Tensor:
    """Return a parametrised weight as the forward pass in evaluation mode makes it.

    Args:
        model: has the weight.
        used: its name as in `Parametrised`.
    """
    prefix, _, leaf = used.rpartition(".")
    module = model.get_submodule(prefix)
    chains = dict(_chains(module))
    if leaf in chains:
        with evaluating(chains[leaf]), torch.no_grad():
            return chains[leaf]()
    hook = next(hook for hook in _hooks(module) if _leaf(hook) == leaf)
    return _compute(hook, module)


@torch.no_grad()
def refresh(model: nn.Module, used: str) -> None:
    """Update the attribute `used`, where a hook sets it before each forward pass."""
    prefix, _, leaf = used.rpartition(".")
    module = model.get_submodule(prefix)
    for hook in _hooks(module):
        if _leaf(hook) == leaf:
            setattr(module, leaf, _compute(hook, module))


# ----------------------------------------------------------------------- parametrizations


def _chains(module: nn.Module) -> Iterator[tuple[str, ParametrizationList]]:
    """Yield (leaf, parametrizations) of a module's own tensors, those of parameters only."""
    chains = getattr(module, "parametrizations", None)
    if isinstance(chains, nn.ModuleDict):
        for leaf, chain in chains.items():
            if isinstance(chain, ParametrizationList) and dict(chain.named_parameters()):
                yield leaf, chain


def _describe_chain(stem: str, leaf: str, chain: ParametrizationList) -> Parametrised:
    below = f"{stem}parametrizations.{leaf}."
    stored, norm_dim = _known_chain(chain) or _try_out(chain)
    has_norms = len(chain) == 1 and isinstance(chain[0], _WeightNorm)
    return Parametrised(
        used=stem + leaf,
        parts=tuple(below + name for name, _ in chain.named_parameters()),
        stored=None if stored is None else below + stored,
        by=", ".join(type(one).__name__.removeprefix("_") for one in chain),
        norm_dim=norm_dim,
        norms=f"{below}original0" if has_norms else None,
    )


def _known_chain(chain: ParametrizationList) -> tuple[str, int] | None:
    """Return the result of `_try_out` for weight and spectral norms, or None for others."""
    if not all(isinstance(one, _WeightNorm | _SpectralNorm) for one in chain):
        return None
    first = chain[0]
    return ("original1", first.dim) if isinstance(first, _WeightNorm) else ("original", WHOLE)


@torch.no_grad()
def _try_out(chain: ParametrizationList) -> tuple[str | None, int | None]:
    """Return (the stored tensor whose zeros survive, or None; the dimension of a norm)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            copy = deepcopy(chain).eval()
            for name, _ in chain.named_parameters(recurse=False):
                if all(_keeps_zeros(copy, name, trial) for trial in range(_TRIALS)):
                    return name, _norm_dim(copy, name)
        except Exception:  # a user's own code may raise any error on random numbers
            return None, None
    return None, None


def _keeps_zeros(chain: ParametrizationList, name: str, trial: int) -> bool:
    """Tell whether zeros in the stored tensor `name` come out as zeros at the same places.

    The first trial keeps the other numbers, later ones draw them all. Where a slice of zeros is
    divided by its norm, the result may be NaN.
    """
    if trial:
        for parameter in chain.parameters():
            parameter.normal_()
    stored = chain.get_parameter(name)
    zero = torch.rand(stored.shape, device=stored.device) < 0.5
    zero.view(-1)[trial % zero.numel()] = True
    zero.view(-1)[(trial + 1) % zero.numel()] = False
    stored.normal_().masked_fill_(zero, 0.0)
    made = chain()
    if made.shape != stored.shape or stored.ndim < 2:
        return False
    inside, outside = made[zero], made[~zero]
    kept = bool(((inside == 0) | inside.isnan()).all()) and bool((inside == 0).any())
    return kept and bool((outside.abs() > 0).any())


def _norm_dim(chain: ParametrizationList, name: str) -> int | None:
    """Return the dimension one slice of which must not be zero altogether, `WHOLE`, or None."""
    stored = chain.get_parameter(name)
    for dim in range(stored.ndim):
        stored.normal_().select(dim, 0).zero_()
        if not chain().isfinite().all():
            return dim
    stored.zero_()
    return None if bool(chain().isfinite().all()) else WHOLE


# ----------------------------------------------------------------------------------- hooks


def _hooks(module: nn.Module) -> Iterator[_Hook]:
    """Yield the hooks that set a weight of the module before each forward pass."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Hook):
            yield hook


def _leaf(hook: _Hook) -> str:
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name


def _compute(hook: _Hook, module: nn.Module) -> Tensor:
    if isinstance(hook, prune.BasePruningMethod):
        return hook.apply_mask(module)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    return hook.compute_weight(module)


def _describe_hook(stem: str, hook: _Hook) -> Parametrised:
    used = stem + _leaf(hook)
    parts: tuple[str, ...] = (f"{used}_orig",)
    norm_dim = WHOLE if isinstance(hook, SpectralNorm) else None
    if isinstance(hook, WeightNorm):
        parts, norm_dim = (f"{used}_v", f"{used}_g"), hook.dim
    return Parametrised(
        used=used,
        parts=parts,
        stored=parts[0],
        by=type(hook).__name__,
        norm_dim=norm_dim,
        norms=parts[1] if len(parts) > 1 else None,
    )
