"""JSON documents that hold the sha256 of their own content, so that reading detects damage.

A truncated file is seldom JSON; a file with a flipped bit often is, with other values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pipeline.base.shapes import read_json

_FIELD = "sha256"
_Shape = TypeVar("_Shape")
_DEPTH = 300  # well below the depth at which Python's stack overflows
_MISMATCH = "its content does not match its sha256"


def with_checksum(document: Mapping[str, Any]) -> bytes:
    """Return a JSON object (finite numbers only) as bytes, with its checksum as a field.

    >>> verified(with_checksum({"answer": 42}))
    {'answer': 42}
    """
    plain = json.loads(_text(document))
    return _text({**plain, _FIELD: _digest(_text(plain))})


def verified(data: bytes) -> dict[str, Any]:
    """Return the document that `with_checksum` encoded.

    Raises:
        ValueError: the data is no JSON object, or does not match its checksum.
    """
    document = _parse(data)
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, got {type(document).__name__}")
    found = document.pop(_FIELD, None)
    if found != _digest(_text(document)):
        raise ValueError(_MISMATCH)
    return document


def read_verified(shape: type[_Shape], data: bytes) -> _Shape:
    """Return a document with a checksum as a dataclass; see `pipeline.base.shapes`.

    A damaged document, or one of another shape, is a ValueError that names the first wrong field.
    """
    verified(data)
    return read_json(shape, data)


def lines_with_checksum(documents: Iterable[Mapping[str, Any]]) -> bytes:
    """Return JSON objects, one per line, below a line with the checksum of all of them."""
    text = "".join(json.dumps(document) + "\n" for document in documents).encode()
    return json.dumps({_FIELD: _digest(text)}).encode() + b"\n" + text


def verified_lines(data: bytes) -> list[dict[str, Any]]:
    """Return the documents that `lines_with_checksum` encoded.

    Raises:
        ValueError: the data does not match its checksum.
    """
    head, _, text = data.partition(b"\n")
    if head != json.dumps({_FIELD: _digest(text)}).encode():
        raise ValueError(_MISMATCH)
    return [_parse(line) for line in text.splitlines()]


def _parse(data: bytes) -> Any:
    too_deep = "it is nested too deeply"
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    level = [document]
    for _ in range(_DEPTH):
        level = [inner for one in level for inner in _children(one)]
        if not level:
            return document
    raise ValueError(too_deep)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _text(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
