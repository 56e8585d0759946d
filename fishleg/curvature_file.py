"""The file of a curvature estimate: safetensors, with the facts as JSON in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishleg.errors import FishLegError

_KEY = "fishleg_curvature"
_VERSION = 1


def write_curvature(path: Path, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write an estimator's state and facts beside it.

    Args:
        path: of the file; another file there is replaced.
        state: from an estimator's `state_dict`.
        facts: JSON-able.

    Raises:
        FishLegError: its folder does not exist.
    """
    from safetensors import TensorSpec, serialize_file  # only files need it

    if not path.parent.is_dir():
        raise FishLegError(f"{path}: expected a folder {path.parent}, got none; make it first.")
    document = json.dumps({"version": _VERSION, "state": state["meta"], "facts": facts})
    # safetensors.torch would need numpy; held here, since the file is written from their memory
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in state["tensors"].items()}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in held.items()
    }
    part = path.with_name(path.name + ".part")
    serialize_file(specs, str(part), {_KEY: document})
    part.replace(path)


def read_curvature(path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an estimator's state, its tensors on `device`, and the facts beside it.

    Raises:
        FishLegError: there is no such file, or it is another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FishLegError(f"{path}: expected a file that Curvature.save wrote, got no file.")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            found = (file.metadata() or {}).get(_KEY)
            # copies lie at aligned addresses, where products round as they did before
            tensors: dict[str, Tensor] = {
                name: file.get_tensor(name).clone() for name in file.keys()
            }
    except SafetensorError as error:
        raise FishLegError(
            f"{path}: expected a safetensors file, got another ({error})."
        ) from error
    document = json.loads(found) if found else {}
    if document.get("version") != _VERSION:
        raise FishLegError(
            f"{path}: expected a file that Curvature.save wrote, in version {_VERSION}, got "
            f"{'another safetensors file' if not found else 'version ' + str(document['version'])}."
        )
    return {"tensors": tensors, "meta": document["state"]}, document["facts"]
