"""A model outside the store: a user's copy (`fls export`), and a module for the registry."""

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

    The example shows shape and type, and is no sample of the data: two samples of zeros, float32
    for images and other values, the data's own type for ids.
    """
    import torch  # `fls export` does without

    from stages.data.dataset import IDS
    from stages.data.source import load_data
    from stages.model_folder import load_model

    model = load_model(source, "cpu")
    dataset, _ = load_data(model.facts.data)
    inputs = dataset.validation.inputs
    dtype = inputs.dtype if inputs.dtype in IDS else torch.float32
    return model.network, torch.zeros(2, *inputs.shape[1:], dtype=dtype).numpy()
