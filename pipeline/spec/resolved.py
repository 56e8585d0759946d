"""The resolved spec of a run: a pipeline file that repeats it, with all options applied.

`--set` and `${env.NAME}` change a pipeline file; the resolved text holds their values. Only an
address with a password stays a reference, because the text is recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.spec.yaml_loader import read_scalar

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_UNPRINTABLE = re.compile("[\ufffe\uffff]")  # YAML allows them only as escapes
_INDENT = 2


def resolved_text(value: Mapping[str, Any], file: str) -> str:
    """Return the text of a spec without references and variables.

    Args:
        value: the spec as data, with all references replaced and all options applied.
        file: its file's name, for a comment.
    """
    spec = {name: entry for name, entry in value.items() if name != "vars"}
    head = f"# {json.dumps(file)} as it ran: all references are replaced, all options applied.\n"
    return head + to_yaml(spec)


def to_yaml(value: Mapping[str, Any]) -> str:
    """Return data as YAML, with mappings as blocks, that `yaml_loader` reads as equal data.

    >>> print(to_yaml({"stages": {"a": {"uses": "start", "params": {"on": "1e-3", "x": [1.5]}}}}))
    stages:
      a:
        uses: start
        params:
          on: "1e-3"
          x: [1.5]
    <BLANKLINE>
    """
    return "".join(f"{line}\n" for line in _lines(value, 0))


def _lines(value: Mapping[str, Any], indent: int) -> Iterator[str]:
    for name, entry in value.items():
        head = f"{' ' * indent}{_scalar(name)}:"
        if isinstance(entry, Mapping) and entry:
            yield head
            yield from _lines(entry, indent + _INDENT)
        else:
            yield f"{head} {_scalar(entry)}"


def _scalar(value: Any) -> str:
    """Return a value on one line; JSON is YAML."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and read_scalar(value) == value:
        return value
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
