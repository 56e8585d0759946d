"""What a run is made with: recorded when it starts, and compared when it goes on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any


def describe_environment(commit: str | None) -> dict[str, Any]:
    """Return Python's version, the platform, all installed packages' versions, and the commit.

    Cost: about a millisecond for each installed package.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {one.name: one.version for one in importlib.metadata.distributions()},
        "commit": commit,
    }


def changed_versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a phrase for Python and each package that both have in different versions.

    >>> changed_versions(
    ...     {"python": "3.11.2", "packages": {"torch": "2.12", "numpy": "2.0"}},
    ...     {"python": "3.11.2", "packages": {"torch": "2.13"}},
    ... )
    ['torch 2.12 -> 2.13']
    """
    old = {"Python": before["python"], **before["packages"]}
    new = {"Python": after["python"], **after["packages"]}
    return [
        f"{name} {old[name]} -> {new[name]}"
        for name in old
        if name in new and old[name] != new[name]
    ]
