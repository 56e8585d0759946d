"""The inputs of a stage: its parameters, upstream outputs, and device, as the stage sees them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.errors import Damaged
from pipeline.stage import Artifact, Context, EventSink, Params, Preemption, StageError
from pipeline.store.store import Store
from pipeline.worker.task import Task, TaskInput, seat_of, threads_of


def load(target: str) -> Any:
    """Import and return the object that `module:attribute` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_context(
    task: Task, store: Store, folder: Path, emit: EventSink, preemption: Preemption
) -> Context:
    """Return the context of an attempt in `folder`, with its upstream outputs fetched.

    A damaged output raises `Damaged`, a GPU that torch cannot use `StageError`.
    """
    # A warm process may have imported torch under another thread count. Torch is looked up and
    # not imported, which a stage without torch should not pay for.
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads_of(task))
    params_model: type[Params] = load(task["params_model"])
    return Context(
        params=params_model.model_validate_json(json.dumps(task["params"])),
        folder=folder,
        inputs=_fetch_inputs(task["inputs"], store),
        device=_device(task, torch),
        threads=threads_of(task),
        **seat_of(task),
        emit=emit,
        checkpoint_every_s=task["checkpoint_every_s"],
        preemption=preemption,
        cell=task["cell"],
        key=task["key"],
    )


def _fetch_inputs(
    inputs: Mapping[str, Sequence[TaskInput]], store: Store
) -> dict[str, list[Artifact]]:
    return {
        name: [
            Artifact(
                cell=source["cell"],
                stage=source["stage"],
                key=source["key"],
                axes=source["axes"],
                path=_fetch(source, store) if source["available"] else None,
            )
            for source in sources
        ]
        for name, sources in inputs.items()
    }


def _fetch(source: TaskInput, store: Store) -> Path:
    """Return the folder of an upstream output.

    Raises:
        Damaged: the output is damaged; or it is gone, because another run found it damaged.
    """
    if store.readable(source["key"]) is None:
        raise Damaged(source["key"], "it was there, and is no more")
    return store.fetch(source["key"], source["output"])


def _device(task: Task, torch: Any) -> str:
    """Return "cuda" for a task that was given a GPU.

    Raises:
        StageError: torch cannot use the GPU; falling back to the CPU would change the result.
    """
    if task["num_gpus"] == 0:
        return "cpu"
    if torch is not None and not torch.cuda.is_available():
        raise StageError(
            f"num_gpus: {task['num_gpus']:g} was requested and granted, but torch "
            f"{torch.__version__} cannot use the GPU. Install a CUDA build of torch, or set "
            "num_gpus: 0."
        )
    return "cuda"
