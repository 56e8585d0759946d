"""Names of options that earlier versions stored, and their present ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fishleg.errors import InvalidOption

_EIGEN = {
    "warm_start": "basis",
    "shrinkage": "shrinkage",
    "sweeps": "basis_sweeps",
    "memory_bytes": "memory_bytes",
    "memory_limit": "memory_limit",
}
"""Options of FishLeg's earlier structure eigen -> those of the method eigen."""


def present_method(method: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the present name of a stored method, and its options.

    Method fishleg in structure eigen is the method eigen; fishleg has no shrinkage any more.

    >>> present_method("fishleg", {"structure": "eigen", "warm_start": "kfac", "steps": 200})
    ('eigen', {'basis': 'kfac'})
    >>> present_method("fishleg", {"structure": "tensor", "shrinkage": 0.5})
    ('fishleg', {'structure': 'tensor'})
    """
    if method != "fishleg":
        return method, dict(options)
    if options.get("structure") == "eigen":
        return "eigen", {_EIGEN[name]: value for name, value in options.items() if name in _EIGEN}
    return method, {name: value for name, value in options.items() if name != "shrinkage"}


def refuse_eigen(structure: object) -> None:
    """Check that a structure of FishLeg is not the earlier structure eigen.

    Raises:
        InvalidOption: it is; the error names the method eigen.
    """
    if structure == "eigen":
        raise InvalidOption(
            "structure",
            "'eigen' is now a method of its own: write `method: eigen`, with its options under "
            "`eigen` (basis in place of warm_start); in Python, fishleg.estimators.Eigen",
        )
