"""The commands, the code and the keys that the README gives, in its order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("make", "source", "fls", "pip")
_ASSIGNMENTS = r"(?:[A-Z_]+=\S+ )*"
_COMMAND = re.compile(rf"{_ASSIGNMENTS}(?:{'|'.join(PROGRAMS)})(?: |$)")
_KEY = re.compile(r"(plugins|uses|model|dataset|storage): (\S.*)")


@dataclass(frozen=True)
class Piece:
    """A piece of the README that a reader runs or writes down."""

    kind: Literal["command", "code", "key"]
    text: str


def pieces(text: str) -> Iterator[Piece]:
    """Yield indented lines and fenced blocks, then what is in backticks in the prose.

    Raises:
        ValueError: an indented line is no command of a known program.
    """
    prose = []
    parts = re.split(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for place, part in enumerate(parts):
        if place % 3 == 2:
            yield Piece("code", part)
        elif place % 3 == 0:
            for line in part.splitlines():
                if line.startswith("    "):
                    yield Piece("command", _command(line))
                else:
                    prose.append(line)
    for part in re.findall(r"`([^`]+)`", "\n".join(prose)):
        words = " ".join(part.split())
        if _COMMAND.match(words) and " " in words:
            yield Piece("command", words)
        elif _KEY.fullmatch(words):
            yield Piece("key", words)


def _command(line: str) -> str:
    found = re.sub(r"\s{2,}#.*", "", line.strip())
    if not _COMMAND.match(found):
        raise ValueError(f"README.md: {line!r} begins with none of {', '.join(PROGRAMS)}")
    return found
