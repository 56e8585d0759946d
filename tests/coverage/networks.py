"""The classification networks of torchvision: the smallest of each family."""

from __future__ import annotations

import torch
from torch import nn

from stages.models.torchvision_models import build
from tests.coverage.measure import CLASSES, Coverage, measure

NETWORKS: dict[str, int] = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vit_b_16": 224,
    "wide_resnet50_2": 32,
}
"""Network -> height and width of the images that it is measured on."""

QUICK = ("mnasnet0_5", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1")
"""Those that `make test` measures."""


def measure_network(name: str) -> Coverage:
    """Measure a network of NETWORKS on two random images."""
    size = NETWORKS[name]
    draw = torch.Generator().manual_seed(0)

    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(name, CLASSES, **_options(name))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return measure(name, seeded, torch.randn(2, 3, size, size, generator=draw).double())


def _options(name: str) -> dict[str, bool]:
    """Return what spares the initialisation by truncated normals, which takes a minute."""
    return {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
