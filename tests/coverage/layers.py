"""Every layer of torch.nn that has parameters, each in a small network of its own."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.coverage.measure import CLASSES, Coverage, measure

SAMPLES = 2


class Alone(nn.Module):
    """One layer between its input and a fixed nonlinear map to (n, CLASSES).

    Args:
        layer: the layer.
        call: gives the layer its input and returns a tensor (n, ...); the layer itself by default.
    """

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None):
        super().__init__()
        self.layer = layer
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, ...) to (n, CLASSES)."""
        features = self.call(self.layer, x).flatten(1).sin()
        index = 1 + torch.arange(features.shape[1], dtype=features.dtype)
        return features @ torch.stack([((c + 1) * index).cos() for c in range(CLASSES)], dim=1)


Case = tuple[Callable[[], nn.Module], Tensor]


def _noise(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0)).double()


def _tokens(words: int, *shape: int) -> Tensor:
    return torch.randint(words, (SAMPLES, *shape), generator=torch.Generator().manual_seed(0))


def _first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def _self(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x)


def _attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x)[0]


def _cell(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x[:, 1], layer(x[:, 0]))


def _lstm_cell(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x[:, 1], layer(x[:, 0]))[0]


def _log_prob(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.log_prob(x)


def _case(
    make: Callable[[], nn.Module],
    inputs: Tensor,
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Case:
    return lambda: Alone(make(), call), inputs


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)


def _decoder_layer() -> nn.Module:
    return nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)


LAYERS: dict[str, Case] = {
    "Linear": _case(lambda: nn.Linear(4, 5), _noise(4)),
    "Bilinear": _case(lambda: nn.Bilinear(4, 4, 5), _noise(4), _self),
    "Conv1d": _case(lambda: nn.Conv1d(2, 4, 3, padding=1), _noise(2, 6)),
    "Conv2d": _case(lambda: nn.Conv2d(2, 4, 3, padding=1), _noise(2, 5, 5)),
    "Conv3d": _case(lambda: nn.Conv3d(2, 4, 2), _noise(2, 3, 3, 3)),
    "ConvTranspose1d": _case(lambda: nn.ConvTranspose1d(2, 4, 3, stride=2), _noise(2, 4)),
    "ConvTranspose2d": _case(
        lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2), _noise(2, 3, 3)
    ),
    "ConvTranspose3d": _case(lambda: nn.ConvTranspose3d(2, 2, 2), _noise(2, 2, 2, 2)),
    "BatchNorm1d": _case(lambda: nn.BatchNorm1d(4), _noise(4)),
    "BatchNorm2d": _case(lambda: nn.BatchNorm2d(4), _noise(4, 3, 3)),
    "BatchNorm3d": _case(lambda: nn.BatchNorm3d(4), _noise(4, 2, 2, 2)),
    "SyncBatchNorm": _case(lambda: nn.SyncBatchNorm(4), _noise(4, 3)),
    "InstanceNorm1d": _case(lambda: nn.InstanceNorm1d(4, affine=True), _noise(4, 5)),
    "InstanceNorm2d": _case(lambda: nn.InstanceNorm2d(4, affine=True), _noise(4, 3, 3)),
    "InstanceNorm3d": _case(lambda: nn.InstanceNorm3d(4, affine=True), _noise(4, 2, 2, 2)),
    "LayerNorm": _case(lambda: nn.LayerNorm([3, 4]), _noise(5, 3, 4)),
    "GroupNorm": _case(lambda: nn.GroupNorm(2, 4), _noise(4, 3)),
    "RMSNorm": _case(lambda: nn.RMSNorm(4), _noise(3, 4)),
    "PReLU": _case(lambda: nn.PReLU(4), _noise(4, 3)),
    "Embedding": _case(lambda: nn.Embedding(5, 4), _tokens(5, 3)),
    "EmbeddingBag": _case(lambda: nn.EmbeddingBag(5, 4), _tokens(5, 3)),
    "RNN": _case(lambda: nn.RNN(4, 3, 2, batch_first=True), _noise(5, 4), _first),
    "LSTM": _case(lambda: nn.LSTM(4, 3, proj_size=2, batch_first=True), _noise(5, 4), _first),
    "GRU": _case(lambda: nn.GRU(4, 3, bidirectional=True, batch_first=True), _noise(5, 4), _first),
    "RNNCell": _case(lambda: nn.RNNCell(4, 3), _noise(2, 4), _cell),
    "LSTMCell": _case(lambda: nn.LSTMCell(4, 3), _noise(2, 4), _lstm_cell),
    "GRUCell": _case(lambda: nn.GRUCell(4, 3), _noise(2, 4), _cell),
    "MultiheadAttention": _case(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), _noise(3, 4), _attend
    ),
    "TransformerEncoderLayer": _case(_encoder_layer, _noise(3, 4)),
    "TransformerDecoderLayer": _case(_decoder_layer, _noise(3, 4), _self),
    "TransformerEncoder": _case(lambda: nn.TransformerEncoder(_encoder_layer(), 2), _noise(3, 4)),
    "TransformerDecoder": _case(
        lambda: nn.TransformerDecoder(_decoder_layer(), 2), _noise(3, 4), _self
    ),
    "Transformer": _case(
        lambda: nn.Transformer(4, 2, 1, 1, 6, batch_first=True), _noise(3, 4), _self
    ),
    "AdaptiveLogSoftmaxWithLoss": _case(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2.0), _noise(4), _log_prob
    ),
    "LinearCrossEntropyLoss": _case(
        lambda: nn.LinearCrossEntropyLoss(4, 5), _noise(4), lambda layer, x: layer.linear(x)
    ),
}
"""Layer of torch.nn -> how to make a network of it, and its inputs."""

PARAMETRISED: dict[str, Case] = {
    "weight_norm(Linear)": _case(lambda: parametrizations.weight_norm(nn.Linear(4, 5)), _noise(4)),
    "weight_norm(Conv2d)": _case(
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), _noise(2, 5, 5)
    ),
    "spectral_norm(Linear)": _case(
        lambda: parametrizations.spectral_norm(nn.Linear(4, 5)), _noise(4)
    ),
    "orthogonal(Linear)": _case(lambda: parametrizations.orthogonal(nn.Linear(4, 4)), _noise(4)),
}
"""Parametrised layers, in the same form."""


def layers_with_parameters() -> set[str]:
    """Return the names of the layers of torch.nn that a user makes and that have parameters.

    Such a layer, or a class that it is made from, registers parameters or other layers. Lazy layers
    become the plain ones at the first call; containers and bases hold what they are given.
    """
    made = set()
    for name in set(dir(nn)) - _BASES:
        kind = getattr(nn, name)
        if isinstance(kind, type) and issubclass(kind, nn.Module) and not name.startswith("Lazy"):
            bases = [
                base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules")
            ]
            if any(_makes_parameters(base) for base in bases if base is not nn.Module):
                made.add(name)
    return made


_BASES = {"RNNBase", "RNNCellBase", "ParameterList", "ParameterDict"}
_MAKERS = {
    "Parameter", "Linear", "NonDynamicallyQuantizableLinear", "MultiheadAttention", "_get_clones",
    "TransformerEncoder",
}  # fmt: skip


def _makes_parameters(kind: type) -> bool:
    """Tell whether the source of a class calls something that makes parameters."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(getattr(call, "id", getattr(call, "attr", None)) in _MAKERS for call in calls)


def measure_layer(name: str) -> Coverage:
    """Measure a layer of LAYERS or PARAMETRISED."""
    build, inputs = {**LAYERS, **PARAMETRISED}[name]

    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return measure(name, seeded, inputs)
