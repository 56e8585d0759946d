"""How a model's parameters are cut into groups, each seen as one matrix.

Convention for the whole library: a group is a matrix V of shape (rows, columns) = (out, in),
vectorised row-major. A weight of shape (out, ...) is flattened to (out, prod(...)), so a conv
kernel is out x (in/groups k k); a 1-D weight is (d, 1). A bias that goes with the weight is the
last column. Tensors may carry leading batch dimensions: (..., rows, columns).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn

from fishleg.errors import FishLegError, ShapeMismatch

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """One weight tensor, with its bias if it has one, seen as a (rows, columns) matrix.

    Attributes:
        name: the weight's name in the state dict without a trailing `.weight`.
        weight: state-dict name of the weight.
        bias: state-dict name of the bias that forms the last column, or None.
        weight_shape: the weight's own shape.
        prunable: whether weights (never the bias column) may be removed.
    """

    name: str
    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    prunable: bool

    @property
    def rows(self) -> int:
        """Number of outputs: the weight's first dimension (1 for a scalar)."""
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
            ShapeMismatch: a trailing shape is not the parameter's.
        """
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
    """The groups that curvature is estimated for, and what is left out.

    Attributes:
        groups: in state-dict order of their weights.
        uncovered: (state-dict name, reason) of every parameter that no group covers.
    """

    groups: tuple[ParameterGroup, ...]
    uncovered: tuple[tuple[str, str], ...] = ()
    _by_name: dict[str, ParameterGroup] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {group.name: group for group in self.groups})

    def __getitem__(self, name: str) -> ParameterGroup:
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


def partition_parameters(
    model: nn.Module,
    *,
    prunable: Sequence[str] = (),
    keep: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Partition:
    """Cut the trainable parameters of `model` into groups.

    A parameter `x.weight` with `x.bias` of matching first dimension forms one group `x`; every
    other parameter is a group of its own. Weights of linear and convolution modules are prunable
    by default; biases, normalisation and 1-D parameters never are. A tied parameter appears once,
    under its first name.

    Args:
        model: any module.
        prunable: `fnmatch` patterns of further parameter names (2-D or more) to make prunable.
        keep: patterns of weights that stay dense (curvature is still estimated).
        skip: patterns of parameters left without curvature; they are reported as uncovered.

    Returns:
        The partition; frozen parameters (`requires_grad=False`) and skipped ones are `uncovered`.

    Raises:
        FishLegError: a pattern matches no parameter.
    """
    parameters = dict(model.named_parameters())
    for pattern in (*prunable, *keep, *skip):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise FishLegError(f"Pattern {pattern!r} matches no parameter of the model.")
    uncovered: list[tuple[str, str]] = []
    covered: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            uncovered.append((name, "frozen: requires_grad is False"))
        elif _matches(name, skip):
            uncovered.append((name, "skipped on request"))
        else:
            covered[name] = parameter
    by_default = {
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(module, _WEIGHTED)
    }
    biases = {name for name in covered if _weight_of(name, covered) is not None}
    groups = []
    for name, parameter in covered.items():
        if name in biases:
            continue
        bias = name.removesuffix("weight") + "bias"
        wanted = name in by_default or _matches(name, prunable)
        groups.append(
            ParameterGroup(
                name=name.removesuffix(".weight"),
                weight=name,
                bias=bias if bias in biases else None,
                weight_shape=tuple(parameter.shape),
                prunable=wanted and parameter.ndim >= 2 and not _matches(name, keep),
            )
        )
    return Partition(tuple(groups), tuple(uncovered))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _weight_of(name: str, parameters: Mapping[str, Tensor]) -> str | None:
    """Return the name of the weight whose bias `name` is, or None."""
    stem, dot, last = name.rpartition(".")
    if last != "bias":
        return None
    weight = f"{stem}{dot}weight"
    if weight not in parameters or parameters[weight].ndim == 0:
        return None
    same = parameters[name].ndim == 1 and parameters[name].shape[0] == parameters[weight].shape[0]
    return weight if same else None
