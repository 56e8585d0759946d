"""The text of a pipeline file: bounded, UTF-8, and without secrets."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pipeline.base import limits
from pipeline.base.errors import BadInput, Position, Problem, SpecError
from pipeline.base.secrets import find_secret


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        BadInput: it cannot be read.
        SpecError: it is too large, or is not UTF-8.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadInput(f"cannot read {path}: expected a regular file")
        with path.open("rb") as file:
            data = file.read(limits.SPEC_BYTES + 1)
            size = max(len(data), os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read {path}: {reason}. Expected a pipeline file.") from None
    if size > limits.SPEC_BYTES:
        position = Position(str(path), 1, 1)
        message = f"expected a file of at most {limits.SPEC_BYTES:,} bytes, got {size:,}"
        raise SpecError([Problem(position, message)])
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode()) + 1
        position = Position(str(path), before.count(b"\n") + 1, column)
        message = f"expected text in UTF-8, got the byte 0x{data[error.start]:02x}"
        raise SpecError([Problem(position, message)]) from None


def refuse_secrets(text: str, file: str, overrides: Sequence[str]) -> None:
    """Check that a spec and its `--set` options contain no secret, because both are recorded.

    Raises:
        SpecError: they contain secrets.
    """
    problems = []
    for where, given in [(file, text), *(("--set", option) for option in overrides)]:
        found = find_secret(given, os.environ)
        if found is None:
            continue
        at, what = found
        line, column = given.count("\n", 0, at) + 1, at - given.rfind("\n", 0, at)
        position = Position(where, line, column) if where == file else Position(where)
        message = (
            f"expected no secrets, because this is recorded; got {what}. Leave it to the "
            "environment of the code that needs it, such as MLFLOW_TRACKING_URI or AWS_PROFILE"
        )
        problems.append(Problem(position, message))
    if problems:
        raise SpecError(problems)
