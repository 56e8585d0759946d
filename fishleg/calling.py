"""The call of a model: its arguments from a batch, and the output that counts.

This is the one place where the library calls a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fishleg.checks import check_function
from fishleg.errors import CapacityExceeded, FishLegError, ShapeMismatch, UnknownName
from fishleg.nests import Nest, count_samples, describe, map_tensors


@dataclass(frozen=True, kw_only=True)
class Calling:
    """The call of a model, and the output that counts.

    By default a batch's inputs are passed as the signature of `forward` demands: a dict whose keys
    are all names of its arguments (or some of them, if it takes any others, too), as keywords; a
    tuple or list, as positional arguments if `forward` requires at least two and accepts that many;
    any other nest, such as a single tensor, as the only argument.

    Attributes:
        call: a function call(model, inputs) in place of that.
        output: the part of the model's result that counts, where it is more than a tensor: an
            index or name in it, or a function of it. A single tensor counts for any index or name:
            a network may have auxiliary outputs in training only.
    """

    call: Callable[[nn.Module, Nest], Any] | None = None
    output: int | str | Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.call is not None:
            check_function("call", self.call, "a function call(model, inputs)")
        if self.output is not None and not isinstance(self.output, int | str):
            check_function("output", self.output, "an index, a name or a function")

    def outputs(self, model: nn.Module, inputs: Nest) -> Tensor:
        """Return the model's outputs (n, ...) for inputs of n samples.

        Raises:
            FishLegError: the model raised an error, which is the cause of this one.
            CapacityExceeded: it ran out of memory.
            ShapeMismatch: the outputs are no tensor with n samples, or not of real numbers.
        """
        samples = count_samples(inputs, "inputs")
        try:
            found = self.run(model, inputs)
        except FishLegError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise CapacityExceeded(
                f"The model ran out of memory on a batch of {samples} samples; lower batch_size. "
                f"({error})"
            ) from error
        except Exception as error:  # a model may raise any type
            raise FishLegError(
                f"{type(model).__name__} raised {type(error).__name__} when it was called as "
                f"{self._describe(model, inputs)}: {str(error).rstrip('.')}. Check that the inputs "
                "have the form that the model takes, and lie on its device; `Calling(call=...)` "
                "calls it in another way."
            ) from error
        if not isinstance(found, Tensor) or found.shape[:1] != (samples,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeMismatch(
                f"The model's outputs: expected a tensor of {samples} samples, got {got}; choose "
                "a part of the result with `Calling(output=...)`, or wrap the model so that it "
                "returns one row of outputs a sample."
            )
        _check_usable(model, found)
        return found

    def run(
        self, model: nn.Module, inputs: Nest, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the model's outputs, unchecked; raises as the model; torch.func may transform it.

        Args:
            model: the model.
            inputs: of a batch.
            parameters: state-dict name -> a value in place of the model's own.
        """
        # A model may write into its inputs; the samples must be the same in every pass.
        inputs = map_tensors(torch.clone, inputs)
        if parameters is None:
            return self._pick(self._call(model, inputs))
        named = {f"model.{name}": value for name, value in parameters.items()}
        return functional_call(_Called(model, self), named, (inputs,))

    def _call(self, model: nn.Module, inputs: Nest) -> Any:
        if self.call is not None:
            return self.call(model, inputs)
        args, kwargs = _arguments(model, inputs)
        return model(*args, **kwargs)

    def _pick(self, result: Any) -> Tensor:
        """Return the part of a model's result that counts.

        Raises:
            ShapeMismatch: the choice among several outputs is not given.
            UnknownName: there is no such output.
        """
        if callable(self.output):
            return self.output(result)
        if isinstance(result, Tensor):
            return result
        known = _outputs_of(result)
        if self.output is None:
            if not known:
                raise ShapeMismatch(
                    f"The model's outputs: expected a tensor, got {type(result).__name__}; take "
                    "it from the result with `Calling(output=...)`, a function."
                )
            raise ShapeMismatch(
                f"The model's outputs: expected a tensor, got {type(result).__name__} with "
                f"{', '.join(map(repr, known))}; choose one with `Calling(output=...)`."
            )
        if self.output not in known:
            raise UnknownName("output", str(self.output), map(str, known))
        return known[self.output]

    def _describe(self, model: nn.Module, inputs: Nest) -> str:
        if self.call is not None:
            return f"call(model, {describe(inputs)})"
        args, kwargs = _arguments(model, inputs)
        given = [*map(describe, args), *(f"{name}={describe(x)}" for name, x in kwargs.items())]
        return f"model({', '.join(given)})"


PLAIN = Calling()


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU where it has none."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _check_usable(model: nn.Module, outputs: Tensor) -> None:
    """Check that outputs have values, and a derivative where one is wanted.

    Raises:
        ShapeMismatch: they have no values, or none of real numbers.
        FishLegError: they do not depend on the parameters, as far as autograd knows.
    """
    if outputs.is_meta or not outputs.is_floating_point():
        got = "none (device meta)" if outputs.is_meta else str(outputs.dtype)
        raise ShapeMismatch(
            f"The model's outputs: expected real numbers, got {got}; load the weights, or choose "
            "another part of the result with `Calling(output=...)`."
        )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if torch.is_grad_enabled() and not outputs.requires_grad and trained:
        remedy = "take torch.no_grad(), detach() and the like out of its forward"
        if torch.is_inference_mode_enabled():
            remedy = "leave torch.inference_mode()"
        raise FishLegError(
            f"The model's outputs: expected a derivative by its {len(trained)} trainable "
            f"parameters ({trained[0]}, ...), got outputs that autograd does not connect with "
            f"them; {remedy}."
        )


class _Called(nn.Module):
    """A call of a model as a module, so that its parameters can be replaced."""

    def __init__(self, model: nn.Module, calling: Calling):
        super().__init__()
        self.model = model
        self._calling = calling

    def forward(self, inputs: Nest) -> Tensor:
        return self._calling._pick(self._calling._call(self.model, inputs))


def _outputs_of(result: Any) -> dict[int | str, Any]:
    """Return the outputs that a result names or counts, by index and by name."""
    found: dict[int | str, Any] = {}
    if isinstance(result, Sequence):
        found |= dict(enumerate(result))
    if isinstance(result, Mapping):
        found |= result
    names = [one.name for one in fields(result)] if is_dataclass(result) else []
    for name in (*names, *getattr(result, "_fields", ())):
        found[name] = getattr(result, name)
    return found


def _arguments(model: nn.Module, inputs: Nest) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the positional and keyword arguments that inputs are passed as; see `Calling`."""
    if not isinstance(inputs, dict | tuple | list):
        return (inputs,), {}
    declared = _declared(model)
    kinds = {one.kind for one in declared}
    if isinstance(inputs, dict):
        named = {one.name for one in declared if one.kind in (_EITHER, _KEYWORD)}
        strays = inputs.keys() - named
        fits = not strays or (inspect.Parameter.VAR_KEYWORD in kinds and strays != inputs.keys())
        return ((), inputs) if fits else ((inputs,), {})
    places = [one for one in declared if one.kind in (inspect.Parameter.POSITIONAL_ONLY, _EITHER)]
    needed = sum(one.default is one.empty for one in places)
    room = len(inputs) <= len(places) or inspect.Parameter.VAR_POSITIONAL in kinds
    return (inputs, {}) if 2 <= needed <= len(inputs) and room else ((inputs,), {})


_EITHER, _KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def _declared(model: nn.Module) -> Sequence[inspect.Parameter]:
    """Return the arguments of `forward`; of a wrapper that takes anything, the inner model's."""
    found = list(inspect.signature(model.forward).parameters.values())
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    if isinstance(inner, nn.Module) and not any(one.kind in (_EITHER, _KEYWORD) for one in found):
        return _declared(inner)
    return found
