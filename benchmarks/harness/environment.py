"""The environment of a result: versions, processor, commit and date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_CODE = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs")


def describe_environment(device: str) -> dict[str, Any]:
    """Describe this process, its machine (neither name nor paths) and the device it used."""
    return {
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "device": device,
        "commit": _commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def environment_of(facts: Mapping[str, Any], made_s: float) -> dict[str, Any]:
    """Describe the environment of a pipeline's cell.

    Args:
        facts: of the cell's manifest; missing facts are those of this machine.
        made_s: when, in Unix seconds.
    """
    return {
        **describe_environment(facts["device"]),
        "python": facts["python"],
        "torch": facts["packages"].get("torch"),
        "threads": facts["threads"],
        "date": f"{datetime.fromtimestamp(made_s, UTC):%Y-%m-%d}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the working directory, marked if files other than results differ."""
    try:
        commit = _git("rev-parse", "HEAD").stdout.strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *_CODE).stdout
    except (OSError, subprocess.SubprocessError):  # no Git here
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - fixed arguments
        ["git", *arguments],  # noqa: S607
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
