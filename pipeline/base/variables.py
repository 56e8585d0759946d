"""Declarations of the environment variables: purpose, default and valid values.

An empty variable counts as unset. Every `fls` command and every worker first checks all variables.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.base.errors import BadInput
from pipeline.base.secrets import redact
from pipeline.base.text import CONTROLS, cut, printable

_LEASE_S = 1.0, 86400.0  # shorter leases fill the store with heartbeats
_PATIENCE_S = 0.0, 86400.0
_MOST_BYTES = 2**60
_SHOWN_CHARACTERS = 80


def _text(text: str) -> str:
    if CONTROLS.search(text) or "\n" in text:
        raise ValueError
    return text


@dataclass(frozen=True, kw_only=True)
class Variable:
    """An environment variable.

    Attributes:
        purpose: the text in `fls --help`.
        default: the value of an unset variable.
        expected: valid values, as error messages name them.
        parse: returns the value of a text; an invalid text is a ValueError.
    """

    name: str
    purpose: str
    default: Any = None
    expected: str = "text without control characters"
    parse: Callable[[str], Any] = _text

    def read(self, environment: Mapping[str, str] | None = None) -> Any:
        """Return its value, or the default.

        Args:
            environment: None for this process's.

        Raises:
            BadInput: its value is invalid.
        """
        text = (os.environ if environment is None else environment).get(self.name)
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            shown = cut(printable(redact(text)), _SHOWN_CHARACTERS)
            raise BadInput(
                f"{self.name} is {shown!r}; expected {self.expected}. Correct it, or unset it."
            ) from None


def _seconds(bounds: tuple[float, float], text: str) -> float:
    value = float(text)
    if not bounds[0] <= value <= bounds[1]:  # NaN is neither
        raise ValueError
    return value


def _bytes(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < math.log10(_MOST_BYTES) + 1):
        raise ValueError
    return int(text)


def _devices(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_,/:. -]*", text):
        raise ValueError
    return text


def _cluster(text: str) -> str | None:
    return None if text == "local" else _text(text)  # Ray's name for a cluster of this process


LEASE_S = Variable(
    name="FLS_LEASE_S",
    purpose="seconds of silence after which a worker or a driver counts as dead (30)",
    default=30.0,
    expected=f"seconds from {_LEASE_S[0]:g} to {_LEASE_S[1]:g}, such as 30",
    parse=partial(_seconds, _LEASE_S),
)
PATIENCE_S = Variable(
    name="FLS_PATIENCE_S",
    purpose="seconds of waiting for a storage that is away, full or failing (120)",
    default=120.0,
    expected=f"seconds from {_PATIENCE_S[0]:g} to {_PATIENCE_S[1]:g}, such as 120",
    parse=partial(_seconds, _PATIENCE_S),
)
CACHE_BYTES = Variable(
    name="FLS_CACHE_BYTES",
    purpose="bytes of local copies of a store in S3 (20000000000)",
    default=20_000_000_000,
    expected="a number of bytes, such as 5000000",
    parse=_bytes,
)
STORAGE = Variable(name="FISHLEG_STORAGE", purpose="replaces `storage:` in every file")
DATA = Variable(name="FISHLEG_DATA", purpose="folder of the data sets (data)", default="data")
TRACKING_URI = Variable(
    name="MLFLOW_TRACKING_URI", purpose="MLflow's address; replaces `tracking_uri:`"
)
RAY_ADDRESS = Variable(
    name="RAY_ADDRESS",
    purpose="the Ray cluster to run on; unset or `local`: one on this machine, for this run",
    parse=_cluster,
)
RAY_JOB = Variable(
    name="RAY_JOB_CONFIG_JSON_ENV_VAR",
    purpose="set by Ray for the command of a submitted job",
    parse=str,
)
CUDA_DEVICES = Variable(
    name="CUDA_VISIBLE_DEVICES",
    purpose="the GPUs that may be used (all)",
    expected="numbers or names of GPUs with commas between them, such as 0,1",
    parse=_devices,
)
CACHE_HOME = Variable(
    name="XDG_CACHE_HOME", purpose="folder of the cache of file digests (~/.cache)"
)

VARIABLES = (
    STORAGE,
    DATA,
    LEASE_S,
    PATIENCE_S,
    CACHE_BYTES,
    TRACKING_URI,
    RAY_ADDRESS,
    RAY_JOB,
    CUDA_DEVICES,
    CACHE_HOME,
)


def check_variables() -> None:
    """Check all variables.

    Raises:
        BadInput: some values are invalid; names all of them.
    """
    problems = []
    for variable in VARIABLES:
        try:
            variable.read()
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput("\n".join(problems))
