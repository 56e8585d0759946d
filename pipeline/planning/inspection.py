"""Inspection of cells before they run, by the plugin's inspector: `fls inspect`.

The inspector runs in its own process, so its imports and crashes do not affect planning.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.base.errors import BadInput
from pipeline.base.search_path import python_command, search_variable
from pipeline.spec.cells import Cell, resolve
from pipeline.spec.plugins import import_catalogue
from pipeline.spec.spec import Spec
from pipeline.stage import StageError


def inspect(spec: Spec, address: str | None) -> list[dict[str, Any]]:
    """Return the inspectors' reports on cells; see `Catalogue.inspector`.

    Args:
        spec: the pipeline.
        address: the address of cells, inspected with all cells upstream; None for all cells.

    Raises:
        BadInput: no cell can be inspected, or an inspector refuses one.
    """
    wanted = (
        {cell.name for cell in spec.cells} if address is None else _with_upstream(spec, address)
    )
    found: list[dict[str, Any]] = []
    for plugin in spec.plugins:
        catalogue = plugin.catalogue
        cells = [
            cell
            for cell in spec.cells
            if cell.name in wanted and cell.declaration.name in catalogue.inspects
        ]
        if catalogue.inspector is not None and cells:
            found += _ask(plugin.module, catalogue.inspector, cells)
    if not found:
        raise BadInput(f"{address or spec.path} has no cell that can be inspected.")
    return found


def _with_upstream(spec: Spec, address: str) -> set[str]:
    names = {cell.name for cell in resolve(address, spec.cells)}
    for cell in reversed(spec.cells):
        if cell.name in names:
            names.update(cell.sources)
    return names


def _ask(plugin: str, inspector: str, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    request = {
        "plugin": plugin,
        "inspector": inspector,
        "cells": [
            [cell.name, cell.declaration.name, cell.params.model_dump(mode="json")]
            for cell in cells
        ],
    }
    ran = subprocess.run(  # noqa: S603 - our own interpreter and module
        python_command("pipeline.planning.inspection"),
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **search_variable()},
    )
    try:
        answer = json.loads(ran.stdout)
    except ValueError:
        raise BadInput(f"{inspector} ended with {ran.returncode}; see above.") from None
    if "error" in answer:
        raise BadInput(answer["error"])
    return list(answer["found"])


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    plugin = import_catalogue(request["plugin"])
    if plugin is None:
        raise StageError(f"{request['plugin']} has no CATALOGUE.")
    stages = {stage.name: stage for stage in plugin.catalogue.stages}
    cells = {
        name: stages[stage].params.model_validate(params)
        for name, stage, params in request["cells"]
    }
    module, _, attribute = request["inspector"].partition(":")
    try:
        return {"found": getattr(importlib.import_module(module), attribute)(cells)}
    except StageError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # imports may print
        reply = _answer(json.load(sys.stdin))
    sys.stdout.write(json.dumps(reply))
