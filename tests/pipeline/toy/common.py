"""What all toy stages use."""

import json
import os
from pathlib import Path

from pipeline.stage import Context, write_json


def count_run(ctx: Context) -> None:
    """Append the cell's name to the file named by `TOY_LOG`, if there is one."""
    log = os.environ.get("TOY_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(ctx.cell + "\n")


def load_number(folder: Path) -> float:
    return json.loads((folder / "number.json").read_text())["number"]


def save_number(ctx: Context, number: float) -> None:
    count_run(ctx)
    write_json(ctx.output("number") / "number.json", {"number": number})
    ctx.log({"number": number})
