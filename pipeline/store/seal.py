"""Sealed documents: JSON with the sha256 of its own content, by which damage is noticed.

A truncated file mostly is no JSON any more; one with a flipped bit often still is, and says
something else. So whatever the store writes carries a seal, which reading checks and takes off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pipeline.base.shapes import read_json

_SEAL = "sha256"
_Shape = TypeVar("_Shape")
_DEPTH = 300  # twice or three times as many calls of Python still fit onto its stack


def seal(document: Mapping[str, Any]) -> bytes:
    """Return a JSON object (finite numbers only) as bytes, with a seal among its fields.

    >>> unseal(seal({"answer": 42}))
    {'answer': 42}
    """
    plain = json.loads(_text(document))
    return _text({**plain, _SEAL: _digest(_text(plain))})


def unseal(data: bytes) -> dict[str, Any]:
    """Return what `seal` was given.

    Raises:
        ValueError: the data is not what `seal` gave back then.
    """
    document = _parse(data)
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, got {type(document).__name__}")
    found = document.pop(_SEAL, None)
    if found != _digest(_text(document)):
        raise ValueError("it is not what its own sha256 says")
    return document


def read_sealed(shape: type[_Shape], data: bytes) -> _Shape:
    """Return a sealed document as its shape, a dataclass; see `pipeline.base.shapes`.

    A damaged one, or one of another shape, is a ValueError that names the first wrong field.
    """
    unseal(data)
    return read_json(shape, data)


def seal_lines(documents: Iterable[Mapping[str, Any]]) -> bytes:
    """Return JSON objects, a line each, below a line that is the seal of them all."""
    text = "".join(json.dumps(document) + "\n" for document in documents).encode()
    return json.dumps({_SEAL: _digest(text)}).encode() + b"\n" + text


def unseal_lines(data: bytes) -> list[dict[str, Any]]:
    """Return what `seal_lines` was given.

    Raises:
        ValueError: the data is not what `seal_lines` gave back then.
    """
    head, _, text = data.partition(b"\n")
    if head != json.dumps({_SEAL: _digest(text)}).encode():
        raise ValueError("it is not what its own sha256 says")
    return [_parse(line) for line in text.splitlines()]


def _parse(data: bytes) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: it is none, or lies deeper in itself than any honest writer makes it.
    """
    too_deep = "it is nested too deeply"
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    level = [document]
    for _ in range(_DEPTH):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return document
    raise ValueError(too_deep)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _text(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
