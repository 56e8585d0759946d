"""Nests: tensors in dicts, tuples and lists, each with the samples in its first dimension.

A lone tensor is the simplest nest. Arrays (anything with `__array__`) become tensors, which share
their memory where they can; mappings become dicts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fishleg.errors import ShapeMismatch

Nest = Any
"""A tensor, or tensors in dicts, tuples (named or not) and lists, at any depth."""


def as_nest(value: Any, what: str) -> Nest:
    """Return `value` with tensors for arrays and dicts for mappings, detached from any graph.

    Args:
        value: the user's.
        what: its name, for messages.

    Raises:
        ShapeMismatch: it is empty, or a value is no dense tensor with a first dimension.
    """
    found = pytree.tree_map_with_path(
        lambda path, leaf: _as_tensors(leaf, what + pytree.keystr(path)), value
    )
    if not pytree.tree_leaves(found):
        raise ShapeMismatch(f"{what}: expected at least one tensor, got {value!r}.")
    return found


def count_samples(nest: Nest, what: str) -> int:
    """Return the number of samples in a nest: the first dimension of all its tensors.

    Raises:
        ShapeMismatch: two of them differ.
    """
    (first_path, first), *others = pytree.tree_leaves_with_path(nest)
    for path, leaf in others:
        if len(leaf) != len(first):
            raise ShapeMismatch(
                f"{what}{pytree.keystr(path)}: expected {len(first)} samples in the first "
                f"dimension, as in {what}{pytree.keystr(first_path)}, got shape "
                f"{tuple(leaf.shape)}."
            )
    return len(first)


def map_tensors(function: Callable[[Tensor], Any], nest: Nest) -> Nest:
    """Return the nest with `function` of each tensor in its place."""
    return pytree.tree_map(function, nest)


def usable(leaf: Tensor) -> Tensor:
    """Return a tensor that may take part in a graph: a copy, if it was made in inference mode."""
    return leaf.clone() if leaf.is_inference() else leaf


def take(nest: Nest, part: slice) -> Nest:
    """Return a run of the samples, as views."""
    return map_tensors(lambda leaf: leaf[part], nest)


def tensors_of(nest: Nest) -> list[Tensor]:
    """Return the tensors of a nest, in its own order."""
    return pytree.tree_leaves(nest)


def nest_bytes(nest: Nest) -> int:
    """Return the bytes of all tensors of a nest."""
    return sum(leaf.nbytes for leaf in tensors_of(nest))


def describe(nest: Any) -> str:
    """Return the nest with shapes and dtypes for tensors, for messages."""
    if isinstance(nest, Tensor):
        return f"{str(nest.dtype).removeprefix('torch.')}{list(nest.shape)}"
    if isinstance(nest, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(one)}" for key, one in nest.items()) + "}"
    if isinstance(nest, tuple | list):
        return "(" + ", ".join(map(describe, nest)) + ")"
    return type(nest).__name__


def _as_tensors(leaf: Any, what: str) -> Nest:
    if isinstance(leaf, Mapping):  # one that torch does not know
        return as_nest(dict(leaf), what)
    if not isinstance(leaf, Tensor):
        leaf = _from_array(leaf, what)
    if leaf.layout != torch.strided or leaf.is_nested:
        kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
        raise ShapeMismatch(
            f"{what}: expected a dense tensor, got a {kind} one; use to_dense(), or pad it."
        )
    if leaf.ndim == 0:
        raise ShapeMismatch(
            f"{what}: expected the samples in the first dimension, got a single number; give one "
            "row a sample, and keep what all samples share in the model."
        )
    return leaf.detach()


def _from_array(leaf: Any, what: str) -> Tensor:
    if not hasattr(leaf, "__array__"):
        raise ShapeMismatch(
            f"{what}: expected a tensor or an array, or dicts, tuples and lists of them, got "
            f"{type(leaf).__name__}."
        )
    with warnings.catch_warnings():
        # nothing here writes to a user's samples
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        try:
            return torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ShapeMismatch(
                f"{what}: expected an array of numbers of one kind, got {kind}, of which torch "
                f"makes no tensor ({error})."
            ) from error
