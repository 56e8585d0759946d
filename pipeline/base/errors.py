"""The exception tree, and the problems reported for a spec.

PipelineError                 exit code 1
|-- BadInput                  exit code 2: the spec, an option or the user's own source is wrong
|   `-- SpecError             all problems of one spec together
|-- TakenOver                 another process has taken the run over
|-- BrokenPromise             a worker used code or data other than its cell's key says
`-- StoreError                the storage
    |-- StorageUnsupported    the storage cannot create a file exclusively
    |-- StorageUnavailable    the storage is full, broken, or out of reach, perhaps briefly
    |-- DamagedDocument       a stored document differs from what was written
    `-- Damaged               a stored result differs from its manifest
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.base import limits
from pipeline.base.text import cut, printable


class PipelineError(Exception):
    """Base of every error that the runner raises on purpose; its text is shown unchanged."""

    exit_code = 1


class BadInput(PipelineError):
    """The user's input is wrong; the message names the mistake and the remedy."""

    exit_code = 2


@dataclass(frozen=True)
class Position:
    """A place in the user's input.

    Attributes:
        file: path as the user gave it, or the option (`--set stage.param=value`) at fault.
        line, column: from 1; 0 in an option, which has no lines.
    """

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One mistake and its position; prints as `file:line:column: message`, on one line."""

    position: Position
    message: str

    def __str__(self) -> str:
        text = f"{self.position}: {cut(self.message, limits.MESSAGE_CHARACTERS)}"
        return " ".join(printable(text).splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Return position and message as JSON data."""
        return {**asdict(self.position), "message": self.message}


class SpecError(BadInput):
    """All problems of a spec, in file order, then those of options; `more`: others may exist."""

    def __init__(self, problems: Iterable[Problem], *, more: bool = False):
        self.problems: Sequence[Problem] = sorted(
            dict.fromkeys(problems),
            key=lambda one: (not one.position.line, one.position.line, one.position.column),
        )
        end = [f"Stopped after {len(self.problems)} problems; there may be more."] if more else []
        super().__init__("\n".join([*map(str, self.problems), *end]))


class BrokenPromise(PipelineError):
    """A worker used code or data that changed after the plan, so its cell's key is wrong."""


class TakenOver(PipelineError):
    """Another process has taken the run over; this one writes nothing more of it."""


class StoreError(PipelineError):
    """A request to the storage failed."""


class StorageUnsupported(StoreError):
    """The storage cannot create a file exclusively, which publication requires."""


class StorageUnavailable(StoreError):
    """The storage is full, broken, or out of reach; a later attempt may succeed."""


class DamagedDocument(StoreError):
    """A stored document is damaged; its content is unknown."""


class Damaged(StoreError):
    """A stored result differs from its manifest; `Store.set_aside` moves it away.

    Attributes:
        key: the cell's key.
        reason: the file, and its damage.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(f"stored result {key[:12]} is damaged: {reason}")
        self.key = key
        self.reason = reason


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the choice nearest to `name`, or "" when none is near.

    Very many or very long names give "": their comparison would take seconds.
    """
    known = [choice for choice in choices if len(choice) <= limits.NAME_CHARACTERS]
    if len(name) > limits.NAME_CHARACTERS or len(known) > limits.CHOICES:
        return ""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
