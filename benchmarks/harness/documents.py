"""The committed results: one JSON document per cell, and one per environment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

Document = dict[str, Any]


def cell_path(results: Path, benchmark: str, cell: str) -> Path:
    """Return the path of a cell's document; special characters are escaped."""
    return results / benchmark / f"{quote(cell, safe='[]=,')}.json"


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document atomically; equal documents give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False)
    part.write_text(f"{text}\n", encoding="utf-8")
    part.replace(path)


def read_document(path: Path) -> Document | None:
    """Return a document, or None if it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def read_cells(results: Path, benchmark: str) -> dict[str, Document]:
    """Return cell name -> document of a benchmark's finished cells, by name."""
    documents = map(read_document, (results / benchmark).glob("*.json"))
    found = {document["cell"]: document for document in documents if document is not None}
    return dict(sorted(found.items()))


def write_environment(results: Path, environment: Mapping[str, Any]) -> str:
    """Store the description of an environment, and return its digest."""
    text = json.dumps(environment, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    write_document(results / "environments" / f"{digest}.json", environment)
    return digest
