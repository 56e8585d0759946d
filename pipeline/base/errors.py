"""The exception tree, and the problems that a spec is reported with.

PipelineError                 exit code 1
|-- BadInput                  exit code 2: the spec, an option or the user's own source is wrong
|   `-- SpecError             all problems of one spec together
|-- TakenOver                 a run is another process's by now
|-- BrokenPromise             what a worker used is not what the key of its cell says
`-- StoreError                the storage
    |-- StorageUnsupported    the storage cannot create a file exclusively
    |-- StorageUnavailable    the storage is full, broken, or out of reach: perhaps not for long
    |-- DamagedDocument       a document of a run is not what was written
    `-- Damaged               a stored result is not what its manifest says
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.base import limits
from pipeline.base.text import cut, printable


class PipelineError(Exception):
    """Base of every error that the runner raises on purpose; its text is shown as it is."""

    exit_code = 1


class BadInput(PipelineError):
    """The user's input is wrong; the message says what, and what would be right."""

    exit_code = 2


@dataclass(frozen=True)
class Position:
    """A place in the user's input.

    Attributes:
        file: path as the user gave it, or the option (`--set stage.param=value`) at fault.
        line: from 1; 0 where there are no lines, as in an option.
        column: from 1; 0 where there are no lines.
    """

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One mistake and where it is; prints as `file:line:column: message`, on one line."""

    position: Position
    message: str

    def __str__(self) -> str:
        text = f"{self.position}: {cut(self.message, limits.MESSAGE_CHARACTERS)}"
        return " ".join(printable(text).splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Return the place and the message, as JSON has them."""
        return {**asdict(self.position), "message": self.message}


class SpecError(BadInput):
    """All problems of a spec, in file order, those of options last; `more`: there may be others."""

    def __init__(self, problems: Iterable[Problem], *, more: bool = False):
        self.problems: Sequence[Problem] = sorted(dict.fromkeys(problems), key=_file_order)
        end = [f"Stopped after {len(self.problems)} problems; there may be more."] if more else []
        super().__init__("\n".join([*map(str, self.problems), *end]))


class BrokenPromise(PipelineError):
    """What a worker used is not what the key of its cell says: it was changed after the plan."""


class TakenOver(PipelineError):
    """A run is another process's by now; this one writes nothing more of it."""


class StoreError(PipelineError):
    """The storage does not do what is asked of it."""


class StorageUnsupported(StoreError):
    """The storage cannot create a file exclusively, which publication rests on."""


class StorageUnavailable(StoreError):
    """The storage is full, broken, or out of reach; trying again later may help."""


class DamagedDocument(StoreError):
    """A document is not what was written; what it said is not known."""


class Damaged(StoreError):
    """A stored result is not what its manifest says; `Store.set_aside` moves it away.

    Attributes:
        key: the cell's key.
        reason: which file, and what is wrong with it.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(f"stored result {key[:12]} is damaged: {reason}")
        self.key = key
        self.reason = reason


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the choice nearest to `name`, or "" when none is near.

    Nor is there a hint among very many or very long names, whose comparison would take seconds.
    """
    known = [choice for choice in choices if len(choice) <= limits.NAME_CHARACTERS]
    if len(name) > limits.NAME_CHARACTERS or len(known) > limits.CHOICES:
        return ""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _file_order(problem: Problem) -> tuple[bool, int, int]:
    position = problem.position
    return position.line == 0, position.line, position.column
