"""The only import of torchvision, which may fail with a CPU-only torch.

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
    """Return `torchvision.<submodule>`; declare the missing operators first where it needs them.

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
    """Declare the operators; the cache keeps the library for the life of the process."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
