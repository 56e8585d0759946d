"""The manifest of a complete result: its origin and the digests of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from pipeline.base.names import require_inside
from pipeline.base.shapes import Count, Texts, Time, checked_as
from pipeline.store.storage.base import list_files


class FileDigest(TypedDict):
    """The sha256 of a file's content in hex, and its size."""

    sha256: str
    bytes: Annotated[int, Field(ge=0)]


@with_config(ConfigDict(extra="allow"))
class Making(TypedDict, total=False):
    """The making of a result: its run, its cell and its time; also device, threads and costs."""

    run: str
    cell: str
    seconds: float
    packages: Texts


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The document of a complete result.

    Attributes:
        key: the cell's key.
        attempt: number of the published attempt.
        ingredients: see `pipeline.planning.keys.Identity`.
        outputs: output -> file -> digest and size.
        making: `Making` with device, threads and cost (`pipeline.worker.cost`); stored as `facts`.
        time: Unix seconds of publication.
    """

    key: str
    attempt: Count
    ingredients: Mapping[str, Any]
    outputs: Mapping[str, Mapping[str, FileDigest]]
    making: Annotated[Mapping[str, Any], checked_as(Making), Field(alias="facts")]
    time: Time

    @property
    def cell(self) -> str:
        """The name of its cell, or ""."""
        return str(self.making.get("cell", ""))

    @property
    def bytes(self) -> int:
        """The size of all outputs."""
        return sum(file["bytes"] for files in self.outputs.values() for file in files.values())


def digest_files(folder: Path) -> dict[str, FileDigest]:
    """Return file -> digest and size of all files in a folder; reads them once.

    Links and invalid names are refused, see `list_files` and `require_inside`.
    """
    found: dict[str, FileDigest] = {}
    for path in list_files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = require_inside(path.relative_to(folder).as_posix())
        found[name] = {"sha256": digest, "bytes": path.stat().st_size}
    return found
