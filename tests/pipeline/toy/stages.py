"""The quick stages."""

import base64
import csv
import json
from pathlib import Path

from pipeline.stage import Context, StageError, write_json
from toy.catalogue import OPERATIONS
from toy.common import count_run, load_number, save_number

# One transparent pixel, so that what claims to be a picture is one.
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "YPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


def start(ctx: Context) -> None:
    save_number(ctx, ctx.params.value + ctx.params.seed)


def add(ctx: Context) -> None:
    save_number(ctx, load_number(ctx.input("number").path) + ctx.params.amount)


def apply(ctx: Context) -> None:
    operation = OPERATIONS.load(ctx.params.operation)
    save_number(ctx, operation(load_number(ctx.input("number").path), ctx.params.operand))


def read(ctx: Context) -> None:
    text = Path(ctx.params.path).read_text()
    try:
        number = int(text)
    except ValueError:
        raise StageError(f"{ctx.params.path}: expected a number, got {text!r}.") from None
    save_number(ctx, number)


def tell(ctx: Context) -> None:
    count_run(ctx)
    for name, values in ctx.params.steps.items():
        for step, value in enumerate(values):
            ctx.log({name: value}, step=step)
    for name, text in {"told.txt": "", **ctx.params.files}.items():
        (ctx.output("told") / name).write_text(text)
    ctx.record("what@it/../told", params=ctx.params.options, metrics=ctx.params.metrics)
    ctx.log(ctx.params.metrics)


def total(ctx: Context) -> None:
    count_run(ctx)
    rows = []
    for artifact in ctx.inputs["numbers"]:
        if artifact.path is None:
            rows.append({"model_cell": artifact.cell, "key": artifact.key, "number": None})
            continue
        number = load_number(artifact.path)
        rows.append({"model_cell": artifact.cell, "key": artifact.key, "number": number})
        ctx.record(artifact.cell, params=artifact.axes, metrics={"number": number})
    write_json(ctx.output("results") / "rows.json", rows)


def report(ctx: Context) -> None:
    count_run(ctx)
    rows = []
    for artifact in ctx.inputs["results"]:
        rows += json.loads((artifact.path / "rows.json").read_text()) if artifact.path else []
    folder = ctx.output("report")
    lines = ["| cell | number |", "|---|---|"]
    lines += [f"| {row['model_cell']} | {row['number']} |" for row in rows]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["model_cell", "key", "number"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "figure.png").write_bytes(base64.b64decode(PIXEL))
