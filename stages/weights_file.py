"""Weights from elsewhere: a safetensors file, read under the network's own names.

Traces of other tools in the names are removed: the prefix of a wrapper (`module.` of DataParallel,
`_orig_mod.` of torch.compile), and the pairs `weight_orig`, `weight_mask` of torch.nn.utils.prune.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from torch import Tensor, nn

from pipeline.stage import StageError
from stages.tensor_files import MASKED, load_into, load_metadata, load_tensors

_WRAPPERS = ("module.", "_orig_mod.", "model.")
_SHOWN = 5  # names in a message


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The masks in a file, and notes about its names.

    Attributes:
        masks: state-dict name -> bool in the tensor's shape, True for survivors: the masks that
            torch.nn.utils.prune keeps beside its tensors, and those that an exported model had.
        notes: changes of the names, a sentence each.
    """

    masks: Mapping[str, Tensor]
    notes: tuple[str, ...]


def load_weights(network: nn.Module, path: Path) -> Loaded:
    """Load a safetensors file whose names and shapes are the network's own.

    Raises:
        StageError: the file is missing, is no safetensors file, does not fit the network, or holds
            a number that is not finite.
    """
    try:
        tensors = load_tensors(path)
    except FileNotFoundError:
        raise StageError(f"{path.absolute()}: no such file; expected a checkpoint.") from None
    own = network.state_dict()
    notes: list[str] = []
    tensors = _unwrapped(tensors, own, notes)
    tensors, masks = _masked(tensors, own, notes)
    trained = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    problems = [*_of_names(tensors, own), *_of_values(tensors, own, trained)]
    if problems:
        raise StageError(f"{path.absolute()} does not fit the network: {' '.join(problems)}")
    load_into(network, tensors)
    for name in _masked_here(path):
        if name in tensors:
            masks[name] = tensors[name] != 0
    return Loaded(masks=masks, notes=tuple(notes))


def _masked_here(path: Path) -> list[str]:
    """Return the tensors whose zeros are a mask, as a file of ours lists them."""
    try:
        names = json.loads(load_metadata(path).get(MASKED, "[]"))
    except ValueError:  # another tool's text under the same key
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _unwrapped(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """Remove a wrapper's prefix that all names have, and the network's own names lack."""
    for prefix in _WRAPPERS:
        foreign = not any(name.startswith(prefix) for name in own)
        if tensors and foreign and all(name.startswith(prefix) for name in tensors):
            notes.append(f"the prefix {prefix!r} was removed from the names in the file")
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _masked(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], notes: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Replace `NAME_orig` and `NAME_mask` by their product NAME, and return the masks as well."""
    plain, masks = dict(tensors), {}
    for name in own:
        original, mask = f"{name}_orig", f"{name}_mask"
        if name in tensors or original not in tensors or mask not in tensors:
            continue
        value, kept = plain.pop(original), plain.pop(mask)
        if value.shape != kept.shape:
            continue  # both names are then unexpected, and named as such
        masks[name] = kept != 0
        plain[name] = value * kept
    if masks:
        notes.append(f"{len(masks)} masks of torch.nn.utils.prune were applied: {_some(masks)}")
    return plain, masks


def _of_names(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return the names that are missing, unexpected, or of another shape, with the nearest ones."""
    missing = [name for name in own if name not in tensors]
    strange = [name for name in tensors if name not in own]
    problems = []
    if missing:
        problems.append(f"The file lacks {_some(_near(missing, strange))}.")
    if strange:
        problems.append(f"The network has no {_some(_near(strange, missing))}.")
    shapes = [
        f"{name} {tuple(tensors[name].shape)} (the network's is {tuple(own[name].shape)})"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if shapes:
        problems.append(f"Other shapes in the file: {_some(shapes)}.")
    if problems:
        problems.append("See model and model_args, and num_classes of the data set.")
    return problems


def _of_values(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], trained: Collection[str]
) -> list[str]:
    """Return the tensors with another kind of number or, if trained, one that is not finite."""
    problems = []
    kinds = [
        f"{name} {tensors[name].dtype} (the network's is {own[name].dtype})".replace("torch.", "")
        for name in own
        if name in tensors and tensors[name].is_floating_point() != own[name].is_floating_point()
    ]
    if kinds:
        problems.append(
            f"Other kinds of number in the file: {_some(kinds)}. Convert quantised weights to "
            "floating-point numbers with their own scales."
        )
    endless = [
        name for name, tensor in tensors.items() if name in trained and not tensor.isfinite().all()
    ]
    if endless:
        problems.append(f"Numbers that are not finite (nan or inf): {_some(endless)}.")
    return problems


def _near(names: Iterable[str], others: list[str]) -> list[str]:
    """Return the names, the first ones with the nearest of the others."""
    shown = []
    for name in names:
        near = get_close_matches(name, others, 1, cutoff=0.8)
        shown.append(f"{name} (near: {near[0]})" if near else name)
        if len(shown) == _SHOWN:
            break
    return [*shown, *list(names)[len(shown) :]]


def _some(names: Iterable[str]) -> str:
    """Return the first names, and the number of the rest."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
