"""Tags of MLflow runs: the options of a run, and the machine and packages of a result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pipeline.tracking.base import RunFacts

_MAKING = ("device", "threads", "workers", "platform", "python", "packages")


def asked_tags(run: RunFacts) -> dict[str, str]:
    """Return the options beside the spec's file, as tags."""
    words = [shlex.join([option, one]) for option, given in run.selection.items() for one in given]
    tags = {
        "fls.set": "\n".join(run.overrides),
        "fls.selection": " ".join(words),
        "fls.environment": json.dumps(run.environment) if run.environment else "",
    }
    return {name: text for name, text in tags.items() if text}


def making_tags(making: Mapping[str, Any]) -> dict[str, str]:
    """Return the machine and packages of a result, as tags."""
    found = {f"fls.{name}": making[name] for name in _MAKING if name in making}
    return {n: value if isinstance(value, str) else json.dumps(value) for n, value in found.items()}
