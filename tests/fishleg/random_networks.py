"""Random small networks, each from one number: what a user's network may be made of, in any mix.

A case has a chain of pieces (layers, ways of using a weight, norms, activations) over vectors,
signals, images, volumes, sequences or tokens, and a linear head; then, by chance, a tied or frozen
weight, a parametrisation, a gate that opens later, and a dtype. `Case.text` says what it is.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

CLASSES = 3
SAMPLES = 5
_DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)
_SMOOTH: tuple[Callable[[], nn.Module], ...] = (nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus)


@dataclass
class Case:
    """One network with data.

    Attributes:
        model: in evaluation mode, in `dtype`.
        inputs: (SAMPLES, ...), in `dtype`, or token numbers.
        targets: (SAMPLES,) class numbers.
        dtype: of the parameters.
        text: what the network is made of.
        gates: buffers that are 0 now; `open_gates` opens them.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    dtype: torch.dtype
    text: str
    gates: list[Gate] = field(default_factory=list)

    def open_gates(self) -> None:
        """Let what was behind a gate count."""
        for gate in self.gates:
            gate.opening.fill_(0.7)


class Gate(nn.Module):
    """A linear map whose weight is used again, functionally, behind a gate that may be closed."""

    def __init__(self, width: int, *, branching: bool):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.branching = branching
        self.register_buffer("opening", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        y = self.layer(x).tanh()
        if self.branching and self.opening == 0:
            return y
        return y + self.opening * functional.linear(y, self.layer.weight)


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, a nonlinearity, and the module again."""
        return self.inner(self.inner(x).tanh())


class Functional(nn.Module):
    """Uses a linear layer's weight without calling the layer."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return functional.linear(x, self.layer.weight, self.layer.bias)


class Bare(nn.Module):
    """A matrix and a gain without a module of their own."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.gain = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.gain * (x @ self.mix)


class Pair(nn.Module):
    """Two linear layers that share a weight."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.second(self.first(x).tanh())


class Residual(nn.Module):
    """Adds a module's output to its input."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map x to x + inner(x)."""
        return x + self.inner(x)


class Recurrent(nn.Module):
    """The outputs of a recurrent layer at all times."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, T, width) to (n, T, width')."""
        return self.layer(x)[0]


class Attention(nn.Module):
    """Self-attention over (n, T, width)."""

    def __init__(self, layer: nn.MultiheadAttention):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, T, width) to (n, T, width)."""
        return self.layer(x, x, x, need_weights=False)[0]


class Network(nn.Module):
    """A chain of pieces, a mean over all positions, and a head.

    Args:
        chain: the pieces, over (n, channels, *positions), or (n, T, width) for sequences.
        width: features at the end of the chain.
        channels_first: where the features are.
        embedding: of token numbers, if the inputs are these.
        tied: whether the head's weight is the embedding's, of a vocabulary of CLASSES words.
        head_first: whether the head is registered before the embedding.
    """

    def __init__(
        self,
        chain: list[nn.Module],
        width: int,
        *,
        channels_first: bool,
        embedding: nn.Embedding | None = None,
        tied: bool = False,
        head_first: bool = False,
    ):
        super().__init__()
        head = nn.Linear(width, CLASSES)
        if head_first:
            self.head = head
        if embedding is not None:
            self.embedding = embedding
        self.chain = nn.Sequential(*chain)
        if not head_first:
            self.head = head
        if tied and embedding is not None:
            self.head.weight = embedding.weight
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, ...) to (n, CLASSES)."""
        if hasattr(self, "embedding"):
            x = self.embedding(x)
        x = self.chain(x)
        if self.channels_first:
            x = x.flatten(2).mean(2) if x.ndim > 2 else x
        elif x.ndim > 2:
            x = x.mean(1)
        return self.head(x)


# ------------------------------------------------------------------------------ drawing a case


def random_case(seed: int) -> Case:
    """Return the case of a number; the same one each time."""
    draw = random.Random(seed)  # noqa: S311 - repeatable, not secret
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _DRAWN[draw.choice(sorted(_DRAWN))](draw)


def _vectors(draw: random.Random) -> Case:
    width = draw.randint(2, 5)
    x = torch.randn(SAMPLES, width, dtype=torch.float64)
    chain: list[nn.Module] = []
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(["linear", "square", "norm", "bilinear", "activation"])
        if kind == "linear":
            out = draw.randint(2, 5)
            chain.append(nn.Linear(width, out, bias=draw.random() < 0.7))
            width = out
        elif kind == "square":
            chain.append(_square(draw, width))
        elif kind == "norm":
            chain.append(draw.choice([nn.BatchNorm1d, nn.LayerNorm])(width))
        else:
            chain.append(draw.choice(_SMOOTH)())
    return _finish(draw, Network(chain, width, channels_first=True), x)


def _square(draw: random.Random, width: int) -> nn.Module:
    """Return a piece over (..., width) that keeps its width."""
    made = draw.choice(
        [
            lambda: Twice(nn.Linear(width, width)),
            lambda: Functional(width),
            lambda: Bare(width),
            lambda: Pair(width),
            lambda: Gate(width, branching=False),
            lambda: Gate(width, branching=True),
            lambda: Residual(nn.Linear(width, width)),
        ]
    )
    return made()


def _positions(draw: random.Random, dims: int) -> Case:
    channels = draw.choice([1, 2, 4])
    size = {1: 7, 2: 5, 3: 4}[dims]
    x = torch.randn(SAMPLES, channels, *[size + draw.randint(0, 1) for _ in range(dims)])
    x = x.double()
    chain: list[nn.Module] = []
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(["conv", "conv", "transposed", "norm", "activation", "twice"])
        if kind == "norm":
            piece: nn.Module = _norm(draw, dims, channels)
        elif kind == "activation":
            piece = draw.choice(_SMOOTH)()
        elif kind == "twice":
            square = _CONVS[dims](channels, channels, 3, padding="same")
            piece = draw.choice([Twice, Residual])(square)
        else:
            piece = (_convolution if kind == "conv" else _transposed)(draw, dims, channels)
        try:
            with torch.no_grad():
                whole = nn.Sequential(*chain, piece).double().eval()
                found = whole(x)
                whole(x[:1])
        except (RuntimeError, ValueError):
            continue  # too little is left for the kernel, the padding or the norm
        if found[0].numel() > 400:
            continue
        chain.append(piece)
        channels = found.shape[1]
    if all(isinstance(piece, tuple(type(make()) for make in _SMOOTH)) for piece in chain):
        chain.append(_CONVS[dims](channels, 2, 2))
        channels = 2
    return _finish(draw, Network(chain, channels, channels_first=True), x)


_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _convolution(draw: random.Random, dims: int, channels: int) -> nn.Module:
    groups = draw.choice([g for g in (1, 2, channels) if channels % g == 0])
    padding = draw.choice([0, 1, 2, "same", "valid"])
    return _CONVS[dims](
        channels,
        groups * draw.randint(1, 3),
        tuple(draw.randint(1, 3) for _ in range(dims)),
        stride=1 if padding == "same" else tuple(draw.randint(1, 2) for _ in range(dims)),
        padding=padding,
        dilation=draw.randint(1, 2),
        groups=groups,
        bias=draw.random() < 0.7,
        padding_mode=draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"]),
    )


def _transposed(draw: random.Random, dims: int, channels: int) -> nn.Module:
    groups = draw.choice([g for g in (1, 2, channels) if channels % g == 0])
    stride = draw.randint(1, 2)
    return _TRANSPOSED[dims](
        channels,
        groups * draw.randint(1, 2),
        draw.randint(1, 3),
        stride=stride,
        padding=draw.randint(0, 1),
        output_padding=draw.randint(0, stride - 1),
        groups=groups,
        bias=draw.random() < 0.7,
    )


def _norm(draw: random.Random, dims: int, channels: int) -> nn.Module:
    batch = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    instance = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
    made = draw.choice(
        [
            lambda: batch(channels),
            lambda: nn.GroupNorm(1, channels),
            lambda: nn.GroupNorm(channels, channels),
            lambda: instance(channels, affine=True),
        ]
    )
    return made()


def _sequences(draw: random.Random, *, tokens: bool = False) -> Case:
    width = draw.choice([2, 4])
    embedding, tied = None, False
    if tokens:
        tied = draw.random() < 0.4
        words = CLASSES if tied else draw.randint(2, 5)
        embedding = nn.Embedding(words, width, sparse=not tied and draw.random() < 0.2)
        x = torch.randint(words, (SAMPLES, 4))
    else:
        x = torch.randn(SAMPLES, 4, width, dtype=torch.float64)
    chain: list[nn.Module] = []
    for _ in range(draw.randint(1, 2)):
        kind = draw.choice(["recurrent", "attention", "encoder", "square", "norm", "linear"])
        if kind == "recurrent":
            layer = draw.choice([nn.RNN, nn.GRU, nn.LSTM])
            chain.append(Recurrent(layer(width, width, draw.choice([1, 1, 2]), batch_first=True)))
        elif kind == "attention":
            chain.append(Attention(nn.MultiheadAttention(width, 2, batch_first=True)))
        elif kind == "encoder":
            chain.append(
                nn.TransformerEncoderLayer(
                    width, 2, 3, dropout=0.1, batch_first=True, norm_first=draw.random() < 0.5
                )
            )
        elif kind == "square":
            chain.append(_square(draw, width))
        else:
            chain.append(nn.LayerNorm(width) if kind == "norm" else nn.Linear(width, width))
    network = Network(
        chain,
        width,
        channels_first=False,
        embedding=embedding,
        tied=tied,
        head_first=draw.random() < 0.5,
    )
    return _finish(draw, network, x)


_DRAWN: dict[str, Callable[[random.Random], Case]] = {
    "vectors": _vectors,
    "signals": lambda draw: _positions(draw, 1),
    "images": lambda draw: _positions(draw, 2),
    "images too": lambda draw: _positions(draw, 2),
    "volumes": lambda draw: _positions(draw, 3),
    "sequences": _sequences,
    "tokens": lambda draw: _sequences(draw, tokens=True),
}


def _finish(draw: random.Random, model: nn.Module, inputs: Tensor) -> Case:
    """Move all values from their defaults, parametrise and freeze by chance, choose the dtype."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim:
                tensor += 0.2 * torch.rand(tensor.shape)
    notes = []
    if (layers := _weighted_alone(model)) and draw.random() < 0.15:
        name = draw.choice(layers)
        made = draw.choice([parametrizations.weight_norm, parametrizations.spectral_norm])
        made(model.get_submodule(name))
        notes.append(f"{made.__name__} on {name}")
    if draw.random() < 0.25:
        name = draw.choice(sorted(name for name, _ in model.named_parameters()))
        model.get_parameter(name).requires_grad_(requires_grad=False)
        notes.append(f"{name} frozen")
    dtype = draw.choice(_DTYPES)
    model = model.to(dtype).eval()
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    return Case(
        model=model,
        inputs=inputs,
        targets=torch.arange(SAMPLES) % CLASSES,
        dtype=dtype,
        text="\n".join([str(model), f"{dtype}, inputs {tuple(inputs.shape)}", *notes]),
        gates=[module for module in model.modules() if isinstance(module, Gate)],
    )


def _weighted_alone(model: nn.Module) -> list[str]:
    """Return the names of linear and convolution layers whose weight is no other module's, too."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owners = Counter(id(model.get_parameter(name)) for name in names)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and owners[id(module.weight)] == 1
    ]
