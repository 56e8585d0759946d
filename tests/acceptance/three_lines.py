"""Runs the README's three lines on a network, and checks the zeros.

    python three_lines.py NETWORK BLOCK

NETWORK is `own`, a network and a DataLoader of one's own, which need torch alone; or the name of a
network of torchvision, with random weights. BLOCK is a file with the three lines.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg


class Network(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (n, 3, H, W) to logits (n, 10)."""
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def loader_of(count: int, size: int) -> DataLoader:
    """Return a DataLoader of `count` random images (3, size, size) with labels of 10 classes."""
    data = TensorDataset(torch.randn(count, 3, size, size), torch.arange(count) % 10)
    return DataLoader(data, batch_size=32, shuffle=True)


def run_lines(block: Path, model: nn.Module, loader: DataLoader) -> None:
    """Run the README's lines on a model, and check that nine tenths of its weights are zero."""
    names = {"model": model, "loader": loader}
    exec(compile(block.read_text("utf-8"), str(block), "exec"), names)  # noqa: S102 - our README
    total = sum(weight.numel() for weight in weights_of(model))
    assert zeros_of(model) == names["report"].removed == int(0.9 * total + 0.5), names["report"]


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of convolutions and linear layers."""
    return [one.weight for one in model.modules() if isinstance(one, nn.Conv2d | nn.Linear)]


def zeros_of(model: nn.Module) -> int:
    """Return how many of these weights are zero."""
    return sum(int((weight == 0).sum()) for weight in weights_of(model))


def torchvisions(name: str, block: Path) -> None:
    """Prune a network of torchvision."""
    from stages.torchvision_import import import_torchvision

    model = getattr(import_torchvision("models"), name)(num_classes=10)
    run_lines(block, model, loader_of(64, 32))


def own(block: Path) -> None:
    """Prune a network of one's own, save and load its curvature, and train it with its zeros."""
    absent = [
        name for name in ("numpy", "ray", "mlflow", "typer") if importlib.util.find_spec(name)
    ]
    assert not absent, f"installed: {absent}"
    model, loader = Network(), loader_of(200, 8)

    curvature = fishleg.fit(model, loader, samples=100)
    path = Path(tempfile.mkdtemp()) / "curvature.safetensors"
    curvature.save(path)
    again = fishleg.Curvature.load(path, model)
    assert again.certify(loader)["network"] == curvature.certify(loader)["network"]

    run_lines(block, model, loader)
    removed = zeros_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    fishleg.keep_zeros(optimizer, model)
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    assert zeros_of(model) == removed


if __name__ == "__main__":
    torch.manual_seed(0)
    network, lines = sys.argv[1], Path(sys.argv[2])
    if network == "own":
        own(lines)
    else:
        torchvisions(network, lines)
