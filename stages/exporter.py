"""A model as others use it: a user's copy (`fls export`), and a module for the registry."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def export(source: Path, destination: Path) -> None:
    """Copy `model.safetensors` (the network's own names, zeros in place) and `model.json`."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "model.json"):
        shutil.copyfile(source / name, destination / name)


def load(source: Path) -> tuple[Any, Any]:
    """Return the network, in eval mode on the CPU, and an example of its input.

    The example shows shape and type, and is no sample of the data: zeros, float32 (2, C, H, W).
    """
    import torch  # `fls export` does without

    from stages.data.source import load_data
    from stages.model_folder import load_model

    model = load_model(source, "cpu")
    dataset, _ = load_data(model.facts.data)
    shape = dataset.validation.inputs.shape[1:]
    return model.network, torch.zeros(2, *shape).numpy()
