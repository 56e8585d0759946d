"""The partition of a model's parameters into groups, each seen as one matrix.

Convention for the whole library: a group is a matrix V of shape (rows, columns) = (out, in),
vectorised row-major. A weight of shape (out, ...) is flattened to (out, prod(...)), so a conv
kernel is out x (in/groups k k); a 1-D weight is (d, 1). The weight's bias is the
last column. Tensors may carry leading batch dimensions: (..., rows, columns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import prod

import torch
from torch import Tensor, nn

from fishleg.checks import check_names, check_type
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName
from fishleg.parametrised import evaluate
from fishleg.weights import WeightTensor, find_tensors


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """One weight tensor, with its bias if it has one, seen as a (rows, columns) matrix.

    Attributes:
        name: the weight's name in the state dict without a trailing `.weight`.
        weight: state-dict name of the weight.
        bias: state-dict name of the bias that forms the last column, or None.
        weight_shape: the weight's own shape.
        prunable: whether weights (never the bias column) may be removed.
        names: all state-dict names of the weight, more than one where it is tied; `weight` first.
        used: the tensor that the forward pass reads: `weight`, or the weight that a parametrization
            makes of it, such as `fc.weight` of `fc.parametrizations.weight.original1`.
        norm_dim: of a parametrised weight that is divided by the norms of slices along this
            dimension, or of the whole (`parametrised.WHOLE`), where one of each slice has to
            survive: 0 / 0 is no number. Else None.
        transposed: the first dimension is the inputs', as in transposed convolutions.
        conv_groups: convolution groups of a transposed weight, which divide its inputs, else 1.
    """

    name: str
    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    prunable: bool
    names: tuple[str, ...] = ()
    used: str = ""
    norm_dim: int | None = None
    transposed: bool = False
    conv_groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", self.names or (self.weight,))
        object.__setattr__(self, "used", self.used or self.weight)

    def __repr__(self) -> str:
        kind = "prunable" if self.prunable else "not prunable"
        return f"ParameterGroup({self.name!r}, {self.rows} x {self.columns}, {kind})"

    @property
    def rows(self) -> int:
        """The weight's first dimension (1 for a scalar): the outputs, unless `transposed`."""
        return self.weight_shape[0] if self.weight_shape else 1

    @property
    def weight_columns(self) -> int:
        """Columns that belong to the weight: in/groups k k."""
        return prod(self.weight_shape[1:])

    @property
    def columns(self) -> int:
        """Columns of the matrix, the bias column included."""
        return self.weight_columns + (self.bias is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def size(self) -> int:
        """Entries of the matrix, rows columns."""
        return self.rows * self.columns

    @property
    def kernel(self) -> int:
        """Spatial positions of the kernel, k k (1 for a matrix or vector)."""
        return prod(self.weight_shape[2:])

    @property
    def tensors(self) -> tuple[str, ...]:
        """State-dict names of the group's tensors, weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the group's matrix (..., rows, columns) from named tensors.

        Args:
            tensors: holds (..., *weight_shape) and, with a bias, (..., rows); same leading shape.

        Raises:
            UnknownName: a tensor is missing.
            ShapeMismatch: a trailing shape is not the parameter's.
        """
        for name in self.tensors:
            if name not in tensors:
                raise UnknownName("parameter", name, tensors)
        weight = tensors[self.weight]
        lead = weight.shape[: weight.ndim - len(self.weight_shape)]
        if tuple(weight.shape[len(lead) :]) != self.weight_shape:
            raise ShapeMismatch(
                f"{self.weight}: expected (..., {', '.join(map(str, self.weight_shape))}), "
                f"got {tuple(weight.shape)}."
            )
        matrix = weight.reshape(*lead, self.rows, self.weight_columns)
        if self.bias is None:
            return matrix
        return torch.cat([matrix, tensors[self.bias].reshape(*lead, self.rows, 1)], dim=-1)

    def scatter(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return named tensors from the group's matrix (..., rows, columns): `gather` undone.

        Raises:
            ShapeMismatch: the last two dimensions are not (rows, columns).
        """
        if tuple(matrix.shape[-2:]) != self.shape:
            raise ShapeMismatch(f"{self.name}: expected (..., {self.shape}), got {matrix.shape}.")
        lead = matrix.shape[:-2]
        weight = matrix[..., : self.weight_columns]
        out = {self.weight: weight.reshape((*lead, *self.weight_shape))}
        if self.bias is not None:
            out[self.bias] = matrix[..., -1]
        return out


@dataclass(frozen=True)
class Partition:
    """The groups that curvature is estimated for, and the parameters left out.

    Attributes:
        groups: in state-dict order of their weights.
        uncovered: (state-dict name, reason) of every parameter that no group covers.
        unprunable: (state-dict name, reason) of every weight with two or more dimensions that is
            not prunable, covered or not.
    """

    groups: tuple[ParameterGroup, ...]
    uncovered: tuple[tuple[str, str], ...] = ()
    unprunable: tuple[tuple[str, str], ...] = ()
    _by_name: dict[str, ParameterGroup] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {group.name: group for group in self.groups})

    def __repr__(self) -> str:
        return (
            f"Partition({len(self.groups)} groups, {len(self.prunable)} of them prunable, "
            f"{len(self.uncovered)} parameters without curvature)"
        )

    def __getitem__(self, name: str) -> ParameterGroup:
        if name not in self._by_name:
            raise UnknownName("parameter group", name, self._by_name)
        return self._by_name[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all groups."""
        return tuple(self._by_name)

    @property
    def prunable(self) -> tuple[ParameterGroup, ...]:
        """The prunable groups, in state-dict order."""
        return tuple(group for group in self.groups if group.prunable)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return group name -> matrix for all groups; see `ParameterGroup.gather`."""
        return {group.name: group.gather(tensors) for group in self.groups}

    def scatter(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return state-dict name -> tensor for the groups in `matrices`."""
        out: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            out.update(self[name].scatter(matrix))
        return out


def parameters_like(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's parameters under the names of `tensors`, detached.

    A tied parameter has all its names.

    Raises:
        UnknownName: there is no parameter of a name.
        ShapeMismatch: a tensor differs from its parameter's shape, or two are of one parameter.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    found: dict[nn.Parameter, str] = {}
    for name, value in tensors.items():
        if name not in known:
            raise UnknownName("parameter", name, known)
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != tuple(known[name].shape):
            raise ShapeMismatch(f"{name}: expected {tuple(known[name].shape)}, got {shape}.")
        first = found.setdefault(known[name], name)
        if first != name:
            raise ShapeMismatch(f"{name} and {first} are one tied parameter; give one of them.")
    return {name: known[name].detach() for name in tensors}


def partition_parameters(
    model: nn.Module,
    *,
    prunable: Sequence[str] = (),
    keep: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Partition:
    """Cut the trainable parameters of `model` into groups.

    A parameter `x.weight` with `x.bias` of matching first dimension forms one group `x` (unless the
    bias belongs to another dimension, as in transposed convolutions); every other parameter is a
    group of its own. A tied parameter appears once, under its first name.

    Prunable by default are the weights of linear, bilinear, (transposed) convolutional, recurrent
    and attention layers, parametrised ones (see `find_parametrised`) included; not so embeddings
    and weights tied to one. Biases, normalisation and 1-D parameters never are.

    Args:
        model: any module.
        prunable: names, or `fnmatch` patterns, of further parameters (2-D or more) to make
            prunable. A tied weight has all its names, and a parametrised one also that of the
            weight that it makes.
        keep: likewise, weights that stay dense (curvature is still estimated).
        skip: likewise, parameters left without curvature; they are reported as uncovered.

    Returns:
        The partition; frozen parameters (`requires_grad=False`) and skipped ones are `uncovered`,
        and every weight that is not prunable is in `unprunable`, with the reason.

    A pattern that matches no parameter is a FishLegError, as is one of `prunable` that matches none
    that can be pruned; for others see `find_tensors`.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    for name, patterns in (("prunable", prunable), ("keep", keep), ("skip", skip)):
        check_names(name, patterns)
    tensors = find_tensors(model)
    for pattern in (*prunable, *keep, *skip):
        _check_pattern(pattern, tensors)
    uncovered: list[tuple[str, str]] = []
    unprunable: list[tuple[str, str]] = []
    covered: list[tuple[WeightTensor, bool]] = []
    for tensor in tensors:
        why_uncovered = _why_uncovered(tensor, skip)
        why_dense = why_uncovered or _why_dense(tensor, prunable, keep)
        if why_dense and len(tensor.shape) >= 2:
            unprunable.append((tensor.name, why_dense))
        if why_uncovered:
            uncovered.append((tensor.name, why_uncovered))
        else:
            covered.append((tensor, why_dense is None))
    for pattern in prunable:
        _check_prunable(pattern, tensors, dict(unprunable))
    return Partition(_groups(covered), tuple(uncovered), tuple(unprunable))


def used_weight(model: nn.Module, group: ParameterGroup) -> Tensor:
    """Return a group's weight as the forward pass in evaluation mode reads it, without a graph.

    That is the parameter itself, or the weight that a parametrization makes of it.
    """
    if group.used == group.weight:
        return model.get_parameter(group.weight).detach()
    return evaluate(model, group.used).detach()


_FLAT = "fewer than two dimensions"
_KEPT = "kept dense on request"


def _check_pattern(pattern: str, tensors: Sequence[WeightTensor]) -> None:
    """Check that a pattern matches a parameter.

    Raises:
        FishLegError: it matches none.
    """
    if any(tensor.matches([pattern]) for tensor in tensors):
        return
    known = [name for tensor in tensors for name in tensor.aliases]
    near = get_close_matches(pattern, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise FishLegError(f"Pattern {pattern!r} matches no parameter of the model{hint}.")


def _check_prunable(
    pattern: str, tensors: Sequence[WeightTensor], unprunable: Mapping[str, str]
) -> None:
    """Check that a pattern of `prunable` names a weight that is prunable, or would be but for keep.

    Raises:
        FishLegError: it names none.
    """
    matches = [tensor for tensor in tensors if tensor.matches([pattern])]
    reasons = {
        one.name: _FLAT if len(one.shape) < 2 else unprunable.get(one.name) for one in matches
    }
    if not any(reason in (None, _KEPT) for reason in reasons.values()):
        found = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
        raise FishLegError(f"prunable={pattern!r} names no weight that can be pruned: {found}.")


def _why_uncovered(tensor: WeightTensor, skip: Sequence[str]) -> str | None:
    if not tensor.trainable:
        return "frozen: requires_grad is False"
    if 0 in tensor.shape:
        return "no entries"
    return "skipped on request" if tensor.matches(skip) else None


def _why_dense(tensor: WeightTensor, prunable: Sequence[str], keep: Sequence[str]) -> str | None:
    """Return why a parameter is not prunable, or None if it is."""
    if len(tensor.shape) < 2:
        return _FLAT
    if tensor.matches(keep):
        return _KEPT
    if tensor.zeros_lost:
        return tensor.zeros_lost
    if tensor.matches(prunable):
        return None
    return tensor.unusual and f"{tensor.unusual}; prunable when named"


def _groups(covered: Sequence[tuple[WeightTensor, bool]]) -> tuple[ParameterGroup, ...]:
    by_name = {name: tensor for tensor, _ in covered for name in tensor.names}
    biases: dict[str, str] = {}  # of a weight
    for tensor, _ in covered:
        bias = _bias_of(tensor, by_name)
        if bias is not None and bias.name not in biases.values():
            biases[tensor.name] = bias.name
    return tuple(
        ParameterGroup(
            name=tensor.uses[0].removesuffix(".weight"),
            weight=tensor.name,
            bias=biases.get(tensor.name),
            weight_shape=tensor.shape,
            prunable=prunable,
            names=tensor.names,
            used=tensor.uses[0],
            norm_dim=tensor.norm_dim,
            transposed=tensor.transposed,
            conv_groups=tensor.conv_groups,
        )
        for tensor, prunable in covered
        if tensor.name not in biases.values()
    )


def _bias_of(weight: WeightTensor, by_name: Mapping[str, WeightTensor]) -> WeightTensor | None:
    """Return the bias whose entries belong to the weight's first dimension, if there is one."""
    if not weight.shape or weight.transposed:
        return None
    for use in weight.uses:
        stem, dot, leaf = use.rpartition(".")
        bias = by_name.get(f"{stem}{dot}bias") if leaf == "weight" else None
        if bias is not None and bias.shape == weight.shape[:1]:
            return bias
    return None
