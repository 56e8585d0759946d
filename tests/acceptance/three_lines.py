"""The three lines, on a network and a DataLoader of one's own, where torch alone is installed."""

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


def main() -> None:
    """Prune the network, save and load its curvature, and train it with its zeros kept."""
    absent = [
        name for name in ("numpy", "ray", "mlflow", "typer") if importlib.util.find_spec(name)
    ]
    assert not absent, f"installed: {absent}"
    torch.manual_seed(0)
    model = Network()
    images, labels = torch.randn(200, 3, 8, 8), torch.arange(200) % 10
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)

    curvature = fishleg.fit(model, loader, samples=100)
    path = Path(tempfile.mkdtemp()) / "curvature.safetensors"
    curvature.save(path)
    again = fishleg.Curvature.load(path, model)
    assert again.certify(loader)["network"] == curvature.certify(loader)["network"]

    report = fishleg.prune(model, loader, sparsity=0.5)
    print(report)

    assert report.removed == 436, report.removed  # half of 872
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    fishleg.keep_zeros(optimizer, model)
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    weights = (model.first.weight, model.second.weight, model.head.weight)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == report.removed, zeros
    assert "safetensors" in sys.modules


if __name__ == "__main__":
    main()
