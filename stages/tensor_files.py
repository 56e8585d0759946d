"""Named tensors in safetensors files, of any device, layout and sharing of memory."""

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
    """Write tensors to `path`, with texts as metadata; tied tensors have all of their names.

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
    """Sort the texts of a safetensors file, in place.

    The library writes them in an order that changes from call to call. A file begins with the
    length of its header, 8 bytes, and the header as JSON.

    Raises:
        RuntimeError: the sorted header is longer, as another version of the library may write it.
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

    A missing file is a FileNotFoundError.
    """
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        with path.open("rb") as file:
            pickled = file.read(4).startswith(_PICKLES)
        found = "a pickle, which can run any code when it is read; it was not" if pickled else error
        raise StageError(
            f"{path.absolute()}: expected a safetensors file, got {found}. If you trust the file, "
            "convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), path)."
        ) from None


def load_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file holds beside its tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_into(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a network with the same state-dict names.

    A state dict also carries the versions of its modules, which a file of tensors lacks, and which
    some modules require (torchvision's MNASNet): the network's own are used.
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
