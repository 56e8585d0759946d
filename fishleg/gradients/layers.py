"""Per-sample gradients of single layers, from a layer's input and the gradient of its output.

Notation: n samples, D label draws a sample, T positions (tokens, pixels; 1 for plain vectors),
h convolution groups, c = in/groups k k columns. A layer's input a has n rows; gradients g with
respect to its output have a further dimension for the draws: (n, D, ...). FLOPs count a
multiply-add as two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from fishleg.precision import widen

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_FORWARDS = {
    layer.forward for layer in (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.LayerNorm, nn.GroupNorm)
}


@dataclass(frozen=True)
class LayerSignals:
    """The inputs of a linear or convolution layer, and the gradients of its outputs.

    For sample n, draw d and the rows of convolution group k (h = 1 where there are no groups) the
    gradient is G = sum_t output_gradients[n, d, k, t] activations[n, k, t]^T.

    Attributes:
        activations: (n, h, T, columns); a bias gives a last column of ones.
        output_gradients: (n, D, h, T, rows / h), scaled as the gradients are.
    """

    activations: Tensor
    output_gradients: Tensor


def is_supported(module: nn.Module) -> bool:
    """Tell whether `layer_gradients` knows the module's type and options.

    A subclass is known if it does not override `forward`.
    """
    if type(module).forward not in _FORWARDS:
        return False
    if any(0 in parameter.shape for parameter in module.parameters()):
        return False
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, _BatchNorm):
        return module.running_mean is not None
    return True


def has_signals(module: nn.Module) -> bool:
    """Tell whether `layer_signals` knows the module: a supported linear or convolution layer."""
    return isinstance(module, nn.Linear | nn.Conv2d) and is_supported(module)


def layer_gradients(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Return the per-sample gradients of the module's own "weight" and "bias".

    Args:
        module: one for which `is_supported` is true; batch norm is taken in evaluation mode.
        a: input, (n, ...).
        g: gradients with respect to the output, (n, D, ...).

    Returns:
        Parameter name -> (n, D, *its shape); "bias" also where the module has none.

    Raises:
        TypeError: the module is of another type.

    Cost: linear and convolution layers 2 n D T rows c FLOPs, as the layer's forward pass; writes
    the 4 n D rows c bytes (float32) of the gradient; the convolution reads its input k k times,
    or writes and reads it unfolded, 4 n T c bytes. Norms O(size of the input).
    """
    if isinstance(module, nn.Linear):
        return _linear_gradients(a, g)
    if isinstance(module, nn.Conv2d):
        return _conv_gradients(module, a, g)
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | _BatchNorm):
        return _norm_gradients(module, a, g)
    raise TypeError(f"No per-sample gradients for layers of type {type(module).__name__}.")


def layer_signals(module: nn.Module, a: Tensor, g: Tensor, *, bias: bool) -> LayerSignals:
    """Return the signals of a linear or convolution layer; arguments as in `layer_gradients`.

    Args:
        module: one for which `has_signals` is true.
        a: input, (n, ...).
        g: gradients with respect to the output, (n, D, ...).
        bias: append a column of ones to the activations.

    Cost: a convolution's unfolded input takes 4 n T c h bytes in float32, c = in/groups k k.
    """
    if isinstance(module, nn.Conv2d):
        conv_groups = module.groups
        activations = _unfold(module, a).unflatten(1, (conv_groups, -1)).mT
        gradients = g.flatten(3).unflatten(2, (conv_groups, -1)).mT
    else:
        activations = a.reshape(a.shape[0], 1, -1, a.shape[-1])
        gradients = g.reshape(*g.shape[:2], 1, -1, g.shape[-1])
    if bias:
        activations = functional.pad(activations, (0, 1), value=1.0)
    return LayerSignals(activations, gradients)


def _linear_gradients(a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Weight: sum_t g_t a_t^T; a (n, *positions, in), g (n, D, *positions, out)."""
    a = a.reshape(a.shape[0], 1, -1, a.shape[-1])
    g = g.reshape(*g.shape[:2], -1, g.shape[-1])
    # One position: the outer product is 30 times faster than a batch of matrix products on a CPU.
    weight = g.mT * a if a.shape[2] == 1 else g.mT @ a
    return {"weight": weight, "bias": g.sum(2)}


def _conv_gradients(module: nn.Conv2d, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Weight: sum_t g_t patch_t^T within each convolution group.

    Two ways to the same sum. With at least as many positions as outputs, all samples' weight
    gradients are ONE convolution weight gradient with n D groups (3 to 10 times faster on a CPU,
    where writing the unfolded input dominates). With few positions the gradient itself is the
    large tensor, and the matrix product writes it fastest; so it does for k = 1.
    """
    n, draws, rows = g.shape[:3]
    positions = g[0, 0, 0].numel()
    if module.kernel_size == (1, 1) or positions < rows // module.groups:
        signals = layer_signals(module, a, g, bias=False)
        weight = signals.output_gradients.mT @ signals.activations.unsqueeze(1)
    else:
        weight = conv2d_weight(
            a.unsqueeze(1).expand(n, draws, *a.shape[1:]).reshape(1, -1, *a.shape[2:]),
            [n * draws * rows, *module.weight.shape[1:]],
            g.reshape(1, -1, *g.shape[3:]),
            module.stride,
            module.padding,
            module.dilation,
            n * draws * module.groups,
        )
    return {"weight": weight.reshape(n, draws, *module.weight.shape), "bias": g.flatten(3).sum(3)}


def _unfold(module: nn.Conv2d, a: Tensor) -> Tensor:
    """Return the patches that the kernel meets, (n, in k k, T): `functional.unfold`, 2 x faster.

    One strided copy; none at all for k = 1 without padding or stride.
    """
    high, wide = cast(tuple[int, int], module.padding)  # never a word: see `is_supported`
    padded = functional.pad(a, (wide, wide, high, high))
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    counts = [
        (size - span - 1) // step + 1
        for size, span, step in zip(padded.shape[2:], spans, module.stride, strict=True)
    ]
    *outer, down, right = padded.stride()
    windows = padded.as_strided(
        (*padded.shape[:2], *module.kernel_size, *counts),
        (
            *outer,
            module.dilation[0] * down,
            module.dilation[1] * right,
            module.stride[0] * down,
            module.stride[1] * right,
        ),
    )
    return windows.reshape(len(a), -1, counts[0] * counts[1])


def _norm_gradients(
    module: nn.LayerNorm | nn.GroupNorm | _BatchNorm, a: Tensor, g: Tensor
) -> dict[str, Tensor]:
    """Weight: the sum over positions of g o (normalised input); bias: of g."""
    n, draws = g.shape[:2]
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        normal = functional.layer_norm(a, shape, eps=module.eps).reshape(n, 1, -1, *shape)
        g = g.reshape(n, draws, -1, *shape)
        return {"weight": (g * normal).sum(2), "bias": g.sum(2)}
    if isinstance(module, nn.GroupNorm):
        normal = functional.group_norm(a, module.num_groups, eps=module.eps)
    else:
        mean, variance = cast(tuple[Tensor, Tensor], (module.running_mean, module.running_var))
        normal = functional.batch_norm(a, widen(mean), widen(variance), eps=module.eps)
    channels = a.shape[1]
    g = g.reshape(n, draws, channels, -1)
    return {
        "weight": (g * normal.reshape(n, 1, channels, -1)).sum(3),
        "bias": g.sum(3),
    }
