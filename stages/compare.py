"""Stage `compare`: the table and the figure of all rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.stage import Context, StageError
from stages.report.figure import draw
from stages.report.rows import stage_of
from stages.report.summary import summarise
from stages.report.table import markdown, table_csv

if TYPE_CHECKING:
    from stages.catalogue import CompareParams


def compare(ctx: Context) -> None:
    """Write output `report`: table.md, table.csv and figure.png, of all rows.

    Raises:
        StageError: there are none.
    """
    params: CompareParams = ctx.params
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    measured: dict[str, set[str]] = {}  # measuring stage -> stages of its models
    for artifact in ctx.inputs["results"]:
        if artifact.path is not None:
            found = json.loads((artifact.path / "rows.json").read_text("utf-8"))
            measured.setdefault(artifact.stage, set()).update(map(stage_of, found))
            rows += found
            failed += json.loads((artifact.path / "failed.json").read_text("utf-8"))
    for artifact in ctx.inputs["results"]:
        if artifact.path is None:
            stages = sorted(measured.get(artifact.stage, ()))
            lost = {"model_cell": artifact.cell, "axes": dict(artifact.axes)}
            failed.append({**lost, "stage": stages[0]} if len(stages) == 1 else lost)
    if not rows:
        raise StageError("compare: no model was evaluated; correct a cell upstream.")
    published = [
        (row.method, dict(zip(row.sparsity, row.accuracy, strict=True))) for row in params.published
    ]
    summary = summarise(rows, failed, published)
    folder = ctx.output("report")
    (folder / "table.md").write_text(markdown(summary, params.title), "utf-8")
    (folder / "table.csv").write_text(table_csv(rows), "utf-8")
    draw(summary, params.title, folder / "figure.png")
    ctx.log({"models": len(rows), "failed": len(failed)})
