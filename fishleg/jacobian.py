"""Products with J, the derivative of a batch's outputs by parameters: J v, and J^T u.

Forward mode gives J v where every operation of the model has a rule for it. Where one has none
(a weight under `weight_norm`, checkpointing, a custom function), the derivative of J^T u by u gives
it, for any u: J v = d(<J^T u, v>)/du, two backward passes. Where backward passes cannot be
differentiated (an EmbeddingBag), J v is made number by number, with a backward pass for each.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fishleg.errors import CapacityExceeded, FishLegError
from fishleg.nests import Nest, count_samples, take

Tensors = dict[str, Tensor]
Run = Callable[[Tensors, Nest], Tensor]
"""Maps parameters' values and a batch's inputs to its outputs (n, ...)."""
Products = tuple[Tensor, Tensor, Callable[[Tensor], Tensors]]
"""Outputs, J v in their shape, and u -> J^T u."""

_log = logging.getLogger(__name__)


class Jacobian:
    """Products with the Jacobian of one model, by the first method that it supports.

    A method that has failed is not tried again.
    """

    def __init__(self) -> None:
        self._ways = [_forward_mode, _double_backward, _number_by_number]

    def sandwich(
        self,
        run: Run,
        parameters: Tensors,
        inputs: Nest,
        v: Mapping[str, Tensor],
        image: Callable[[Tensor, Tensor], Tensor],
        check: Callable[[], object],
    ) -> Tensors:
        """Return J^T image(outputs, J v); errors are those of `image`, `check` and `_give_up`.

        Args:
            run: the model.
            parameters: name -> value at which J is taken, of the parameters of J.
            inputs: of a batch.
            v: name -> tensor of the parameter's shape.
            image: maps the outputs and J v to a tensor of the outputs' shape.
            check: raises an error if the model cannot be called at all.
        """
        while True:
            # Without a derivative, a model or torch may raise any type.
            try:
                outputs, tangents, pull_back = self._ways[0](run, parameters, inputs, v)
            except Exception as error:
                check()
                self._give_up(error)
                continue
            images = image(outputs, tangents)
            try:
                return pull_back(images)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Switch to the next method.

        Raises:
            FishLegError: the model supports none.
            CapacityExceeded: the memory was not enough.
        """
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise CapacityExceeded(
                f"F v: the model ran out of memory; lower batch_size. ({error})"
            ) from error
        if len(self._ways) == 1:
            raise FishLegError(
                f"F v: the model has no derivative by its parameters ({error}). Expected one that "
                "torch.autograd.grad can go through; a checkpoint needs use_reentrant=False."
            ) from error
        failed = self._ways.pop(0)
        _log.warning(
            "F v: the model supports no %s (%s); it is computed by a %s, which is slower.",
            _NAMES[failed],
            str(error).partition("\n")[0],
            _NAMES[self._ways[0]],
        )


def _forward_mode(run: Run, parameters: Tensors, inputs: Nest, v: Mapping[str, Tensor]) -> Products:
    """Return the products by forward-mode and reverse-mode derivatives; three passes each."""

    def bound(values: Tensors) -> Tensor:
        return run(values, inputs)

    with warnings.catch_warnings():
        # At the first use torch 2.13 scripts some decompositions of its own, with a warning.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is", DeprecationWarning)
        outputs, tangents = jvp(bound, (parameters,), (dict(v),))[:2]

    def pull_back(u: Tensor) -> Tensors:
        return vjp(bound, parameters)[1](u)[0]

    return outputs, tangents, pull_back


def _double_backward(
    run: Run, parameters: Tensors, inputs: Nest, v: Mapping[str, Tensor]
) -> Products:
    """Return the products by the derivative of J^T u by u: a forward and seven backward passes.

    Raises:
        RuntimeError: the derivative is missing, as of a sparse embedding's gradient, or wrong, as
            where a function's backward pass cannot be differentiated: the check is
            <J^T w, v> = <w, J v> for random w.
    """
    outputs, back = _reverse(run, parameters, inputs)
    u = torch.zeros_like(outputs, requires_grad=True)
    image = back(u, graph=True)
    if any(value.any() and not image[name].requires_grad for name, value in back(u + 1).items()):
        raise RuntimeError("a backward pass cannot be differentiated")
    pairs = [(g, v[name]) for name, g in image.items() if g.requires_grad]
    tangents = torch.zeros_like(outputs)
    if pairs:
        gradients, directions = zip(*pairs, strict=True)
        (found,) = torch.autograd.grad(gradients, u, directions, allow_unused=True)
        tangents = tangents if found is None else found
    allowed = 1e-8 if outputs.dtype == torch.float64 else 1e-4
    generator = torch.Generator().manual_seed(0)
    for _ in range(_PROBES):
        w = torch.randn(outputs.shape, generator=generator).to(outputs)
        image = back(w)
        error = (w * tangents).sum() - _dot(image, v)
        size = w.norm() * tangents.norm() + _dot(image, image).sqrt() * _dot(v, v).sqrt()
        if not bool(error.abs() <= allowed * size):
            raise RuntimeError("a backward pass cannot be differentiated")
    return outputs.detach(), tangents, back


def _number_by_number(
    run: Run, parameters: Tensors, inputs: Nest, v: Mapping[str, Tensor]
) -> Products:
    """Return the products with a backward pass for each output of each sample."""
    tangents = []
    for sample in range(count_samples(inputs, "inputs")):
        outputs, back = _reverse(run, parameters, take(inputs, slice(sample, sample + 1)))
        units = torch.eye(outputs.numel()).to(outputs).reshape(-1, *outputs.shape)
        rows = [_dot(back(unit), v) for unit in units]
        tangents.append(torch.stack(rows).reshape(outputs.shape))
    outputs, back = _reverse(run, parameters, inputs)
    return outputs.detach(), torch.cat(tangents), back


def _reverse(run: Run, parameters: Tensors, inputs: Nest) -> tuple[Tensor, Callable[..., Tensors]]:
    """Return the outputs with their graph, and u -> J^T u through it."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        outputs = run(leaves, inputs)

    def back(u: Tensor, *, graph: bool = False) -> Tensors:
        found = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            u,
            retain_graph=True,
            create_graph=graph,
            materialize_grads=True,
        )
        dense = [g if g.layout == torch.strided else g.to_dense() for g in found]
        return dict(zip(leaves, dense, strict=True))

    return outputs, back


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(one * b[name]).sum() for name, one in a.items()]).sum()


_PROBES = 2  # by chance one may hide an error; see `_double_backward`
_NAMES: dict[Callable[..., Products], str] = {
    _forward_mode: "forward-mode derivative",
    _double_backward: "double backward pass",
    _number_by_number: "backward pass for each output",
}
