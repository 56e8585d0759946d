"""The one place that imports torchvision, which a CPU-only torch may refuse.

The package registry's torchvision wheel registers its compiled operators from a CUDA library. With
a torch built without CUDA that library does not load, and the import then fails with `operator
torchvision::nms does not exist`, because a module of it declares the operator's meta function.
Declaring the two operators first lets the import succeed. Models, data sets and transforms work;
the compiled operators themselves (nms and its kin, not used here) do not.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def import_torchvision(submodule: str) -> ModuleType:
    """Return `torchvision.<submodule>`, declaring the missing operators first if need be.

    Args:
        submodule: such as "models" or "datasets".

    Raises:
        RuntimeError: torchvision fails to load for another reason.
    """
    try:
        return importlib.import_module(f"torchvision.{submodule}")
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::nms does not exist" not in str(error):
            raise
    _declare_operators()
    return importlib.import_module(f"torchvision.{submodule}")


@cache
def _declare_operators() -> torch.library.Library:
    """Declare the operators; the library lives as long as the process, held by the cache."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
