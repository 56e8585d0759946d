"""Named tensors in safetensors files, whatever their device, layout and sharing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to `path`; tied ones are written under each of their names."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        if copy.untyped_storage().data_ptr() in seen:
            copy = copy.clone()  # the format refuses tensors that share memory
        seen.add(copy.untyped_storage().data_ptr())
        plain[name] = copy
    save_file(plain, path, metadata={"format": "pt"})


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a file that `save_tensors` wrote."""
    return load_file(path, device=device)


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors named `PREFIX.NAME`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors named `PREFIX.NAME`, as NAME: `with_prefix` undone."""
    start = f"{prefix}."
    return {k.removeprefix(start): tensor for k, tensor in tensors.items() if k.startswith(start)}
