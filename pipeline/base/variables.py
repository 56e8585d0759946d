"""The environment variables that are read: what each is for, and what it may hold.

An empty one counts as unset. Every `fls` command and every worker checks all of them before it
begins, so none of them fails, or is taken for something else, hours later.
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

_LEASE_S = 1.0, 86400.0  # below, heartbeats would be most of what is stored
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
        name: its name.
        purpose: what it is for, for `fls --help`.
        default: what counts where it is not set.
        expected: what it may hold.
        parse: returns its value; a text that is none is a ValueError.
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
            BadInput: it holds something else than it may.
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
    return None if text == "local" else _text(text)  # Ray's word for an instance of one's own


LEASE_S = Variable(
    name="FLS_LEASE_S",
    purpose="seconds of silence after which a worker or a driver is given up (30)",
    default=30.0,
    expected=f"seconds from {_LEASE_S[0]:g} to {_LEASE_S[1]:g}, such as 30",
    parse=partial(_seconds, _LEASE_S),
)
PATIENCE_S = Variable(
    name="FLS_PATIENCE_S",
    purpose="seconds that a storage which is away, full or failing is waited for (120)",
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
STORAGE = Variable(name="FISHLEG_STORAGE", purpose="takes the place of `storage:` in every file")
DATA = Variable(name="FISHLEG_DATA", purpose="folder of the data sets (data)", default="data")
TRACKING_URI = Variable(
    name="MLFLOW_TRACKING_URI", purpose="MLflow's address; takes the place of `tracking_uri:`"
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
    name="XDG_CACHE_HOME", purpose="folder for what is known of files' digests (~/.cache)"
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
        BadInput: some hold what they may not; names all of them.
    """
    problems = []
    for variable in VARIABLES:
        try:
            variable.read()
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput("\n".join(problems))
