"""Any classification network of `torchvision.models`, untrained, as `torchvision/NAME`."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from pipeline.stage import StageError
from stages.torchvision_import import import_torchvision


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Build `torchvision.models.NAME(num_classes=..., **options)`.

    Raises:
        StageError: torchvision has no such classification model.
    """
    models = import_torchvision("models")
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean torchvision/{near[0]}?)" if near else ""
        raise StageError(f"torchvision.models has no {name!r}{hint}. Known: {', '.join(known)}.")
    return models.get_model(name, num_classes=num_classes, **options)
