"""Runs stages in several processes that share each of them: the ranks of `workers: N`.

As a program it is one of the ranks: it reads jobs as JSON from its standard input.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from running_stages import run_stage

from pipeline.stage import Context
from stages.distributed import joined, require_equal

Job = Mapping[str, Any]
"""`name` of the stage, `folder`, `params`, and perhaps `inputs` and `checkpoint_every_s`, and
`first_checkpoint`, a folder that gets a copy of it; or the name "compare bits"."""


def run_jobs(jobs: Sequence[Job], size: int) -> None:
    """Run each job in `size` processes; the first rank works in the job's folder."""
    texts = [json.dumps([*map(dict, jobs)], default=str)] * size
    folders = os.pathsep.join(str(path) for path in (Path(__file__).parent, *sys.path))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(size)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": folders},
        )
        for rank in range(size)
    ]
    for process, text in zip(processes, texts, strict=True):
        assert process.stdin is not None
        process.stdin.write(text + "\n")
        process.stdin.flush()
    try:
        for process in processes:
            assert process.stderr is not None
            errors = process.stderr.read()
            assert process.wait(timeout=120) == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def compare_bits(folder: Path, rank: int, size: int) -> None:
    """Write what `require_equal` says of equal tensors, and of some that differ in a mask's bit."""
    ctx = Context(params=None, folder=folder, rank=rank, world_size=size)
    ctx.rendezvous = folder.with_name(f"{folder.name}-ranks").as_uri()
    said = []
    with joined(ctx) as rank_group:
        for last in (True, rank == 0):
            try:
                require_equal(rank_group, {"w": torch.ones(3), "mask": torch.tensor([True, last])})
                said.append("equal")
            except RuntimeError as error:
                said.append(str(error))
    folder.mkdir(exist_ok=True)
    (folder / f"{rank}.json").write_text(json.dumps(said))


def main(rank: int, size: int) -> None:
    for job in json.loads(sys.stdin.readline()):
        folder = Path(job["folder"])
        if job["name"] == "compare bits":
            compare_bits(folder, rank, size)
            continue

        def keep_first(event: dict[str, Any], job: Job = job, folder: Path = folder) -> None:
            if event["type"] == "checkpoint" and event["number"] == 1 and "first_checkpoint" in job:
                shutil.copytree(folder / "checkpoints/000001", job["first_checkpoint"])

        ran = run_stage(
            job["name"],
            folder if rank == 0 else folder.with_name(f"{folder.name}-{rank}"),
            job["params"],
            {name: Path(path) for name, path in job.get("inputs", {}).items()},
            rank=rank,
            world_size=size,
            rendezvous=folder.with_name(f"{folder.name}-ranks").as_uri(),
            checkpoint_every_s=job.get("checkpoint_every_s", 30.0),
            watch=keep_first,
        )
        if rank == 0:
            (folder / "events.json").write_text(json.dumps(ran.events))
        else:
            assert not ran.folder.exists() or not any(ran.folder.rglob("*.*"))  # writes nothing


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
