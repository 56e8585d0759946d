"""Named tensors in safetensors files, whatever their device, layout and sharing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.stage import StageError

MASKED = "masked"  # text of a model's file: the names, in JSON, of tensors whose zeros are a mask
_PICKLES = (b"\x80", b"PK\x03\x04")  # how pickles begin, and the archives of torch.save


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to `path`, with texts about them; tied ones go under each of their names.

    Equal content gives equal bytes.
    """
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        if copy.untyped_storage().data_ptr() in seen:
            copy = copy.clone()  # the format refuses tensors that share memory
        seen.add(copy.untyped_storage().data_ptr())
        plain[name] = copy
    save_file(plain, path, metadata={"format": "pt", **(metadata or {})})
    if metadata:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the texts of a safetensors file in order, in place.

    The library writes them in an order that changes from call to call, and equal content has to
    have equal bytes. A file begins with the length of its header, 8 bytes, and the header as JSON.

    Raises:
        RuntimeError: the header does not fit its place, written by another version of the library.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RuntimeError(f"{path}: expected a header of {length} bytes, got {len(text)}.")
        file.seek(8)
        file.write(text.ljust(length))


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, the only kind that is read.

    Raises:
        StageError: it is no such file, perhaps a pickle, which could run any code when read.

    A file that is not there is a FileNotFoundError.
    """
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        with path.open("rb") as file:
            pickled = file.read(4).startswith(_PICKLES)
        what = "a pickle, which can run any code when it is read; it was not" if pickled else error
        raise StageError(
            f"{path.absolute()}: expected a safetensors file, got {what}. If you trust the file, "
            "convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), path)."
        ) from None


def load_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file holds beside its tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_into(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the state dict that was read from a file into a network, whose names must be the same.

    A state dict also carries the versions of its modules, which a file of tensors does not keep,
    and which some modules insist on (torchvision's MNASNet): here they are the network's own.
    """
    state = network.state_dict()
    state.clear()
    state.update(tensors)
    network.load_state_dict(state)


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors named `PREFIX.NAME`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors named `PREFIX.NAME`, as NAME: `with_prefix` undone."""
    start = f"{prefix}."
    return {k.removeprefix(start): tensor for k, tensor in tensors.items() if k.startswith(start)}
