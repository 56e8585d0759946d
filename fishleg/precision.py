"""The dtype that curvature is computed in: float32 at least, for weights of any dtype.

Half precision is for weights at rest and for training. Sums over thousands of gradients, inverses
and conjugate gradients need more, and so does a backward pass whose gradients would underflow. So
a model is computed with copies of its weights in `compute_dtype`, and results are rounded once,
when weights are written. Where a model's own autocast or casts compute in half precision, single
activations are rounded, and sums are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in with tensors of `dtype`: float32 for narrower floats.

    Other dtypes stay: float64, and the integers of sample and token numbers.
    """
    return torch.float32 if is_narrow(dtype) else dtype


def is_narrow(dtype: torch.dtype) -> bool:
    """Tell whether `dtype` is floating point and narrower than float32."""
    return dtype.is_floating_point and dtype.itemsize < 4


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor in its `compute_dtype`; itself where it has that dtype."""
    return tensor.to(compute_dtype(tensor.dtype))


def widest(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in float64, any other unchanged."""
    return tensor.double() if tensor.dtype.is_floating_point else tensor


@contextmanager
def recast(
    model: nn.Module, cast: Callable[[Tensor], Tensor] = widen, *, keep_buffers: bool = False
) -> Iterator[None]:
    """Let the parameters and buffers of `model` be `cast` copies while the block runs.

    Those that the cast does not change stay the same tensors. Tied ones stay tied. The copies
    are leaves, so gradients are taken by them, and writes to them are lost.

    Args:
        model: any module.
        cast: of one tensor.
        keep_buffers: whether the final values of copied buffers are rounded into the buffers.
    """
    kept: list[tuple[nn.Module, str, Tensor]] = []
    copies: dict[int, Tensor] = {}
    try:
        for module in model.modules():
            own = [
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            ]
            for name, tensor in own:
                if id(tensor) not in copies:
                    made = cast(tensor.detach())
                    if made.dtype == tensor.dtype:
                        made = tensor
                    elif isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    copies[id(tensor)] = made
                if copies[id(tensor)] is not tensor:
                    kept.append((module, name, tensor))
                    setattr(module, name, copies[id(tensor)])
        yield
    finally:
        for module, name, tensor in reversed(kept):
            if keep_buffers and not isinstance(tensor, nn.Parameter):
                with torch.no_grad():
                    tensor.copy_(getattr(module, name))
            setattr(module, name, tensor)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Disable the caller's autocast in the block."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def in_full(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Return `function` without the caller's autocast."""

    @wraps(function)
    def inner(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with without_autocast():
            return function(*args, **kwargs)

    return inner
