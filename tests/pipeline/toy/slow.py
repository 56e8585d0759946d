"""The stages that take long, or fail."""

import json
import os
import time
from pathlib import Path

from pipeline.stage import Context, StageError, write_json
from toy.common import load_number, save_number


def slow(ctx: Context) -> None:
    """Take `steps` steps of a linear congruential generator, going on from the checkpoint."""
    state = {"step": 0, "number": ctx.params.seed}
    if ctx.inputs.get("number"):
        state["number"] += int(load_number(ctx.input("number").path))
    last = ctx.last_checkpoint()
    if last is not None:
        state = json.loads((last / "state.json").read_text())
        ctx.say(f"goes on from step {state['step']}")
    while state["step"] < ctx.params.steps:
        time.sleep(ctx.params.delay_s)
        state = {"step": state["step"] + 1, "number": (state["number"] * 75 + 74) % 65537}
        ctx.progress(state["step"], ctx.params.steps, "step")
        ctx.log({"train/number": state["number"]}, step=state["step"])
        if state["step"] % ctx.params.checkpoint_every == 0 or ctx.checkpoint_due():
            with ctx.checkpoint() as folder:
                write_json(folder / "state.json", state)
    save_number(ctx, state["number"])


def fail(ctx: Context) -> None:
    """Fail in the way asked for, until `until` attempts are counted in the file `counter`."""
    if ctx.params.counter:
        counter = Path(ctx.params.counter)
        seen = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(seen + 1))
        if seen >= ctx.params.until:
            save_number(ctx, seen)
            return
    if ctx.params.how == "user":
        raise StageError("this stage fails on purpose; remove it from the spec.")
    if ctx.params.how == "bug":
        raise ZeroDivisionError("a bug on purpose")
    if ctx.params.how == "outage":
        raise ConnectionError("an outage on purpose")
    if ctx.params.how == "exit":
        os._exit(3)
