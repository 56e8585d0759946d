"""A stage that several processes run together."""

import importlib
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from pipeline.stage import Context, StageError, write_json
from toy.common import save_number


def ranks(ctx: Context) -> None:
    """Take `steps` steps; each adds the mean over the ranks of what each of them makes of it."""
    join(ctx)
    Path(f"rank-{ctx.rank}-of-{ctx.world_size}").write_text(str(os.getpid()))
    last = ctx.last_checkpoint()
    state = torch.tensor([0, 0])  # steps done, number
    if last is not None:
        saved = json.loads((last / "state.json").read_text())
        state = torch.tensor([saved["step"], saved["number"]])
        ctx.say(f"goes on from step {saved['step']} with {ctx.world_size}")
    if ctx.world_size > 1:
        dist.broadcast(state, 0)
    step, number = state.tolist()
    while step < ctx.params.steps:
        if (ctx.params.fails, ctx.rank) == ("user", 1):
            raise StageError("rank 1 fails on purpose.")
        time.sleep(ctx.params.delay_s)
        share = torch.tensor([12 // ctx.world_size])
        if ctx.world_size > 1:
            dist.all_reduce(share)
        step, number = step + 1, (number * 75 + int(share)) % 65537
        ctx.progress(step, ctx.params.steps, "step")
        due = step % ctx.params.checkpoint_every == 0 or ctx.preemption.asked
        if ctx.rank == 0 and due:
            with ctx.checkpoint() as folder:
                write_json(folder / "state.json", {"step": step, "number": number})
    if ctx.params.path and ctx.rank == 0:
        number = int(Path(ctx.params.path).read_text())
    if ctx.params.imports and ctx.rank == 1:
        importlib.import_module(ctx.params.imports)
    if ctx.rank == 0:
        save_number(ctx, number)
    if ctx.rendezvous:
        dist.destroy_process_group()


def join(ctx: Context) -> None:
    if ctx.rendezvous:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo",
            init_method=ctx.rendezvous,
            rank=ctx.rank,
            world_size=ctx.world_size,
            timeout=timedelta(seconds=60),
        )
