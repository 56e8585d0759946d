"""In-stage checkpoints: the named states of the objects that a stage computes with, and a cursor.

On disk, a folder: `checkpoint.safetensors` (tensors `STATE.NAME`), `checkpoint.json` (the format,
the cursor, and the JSON part of each state), and the folders that belong to it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fishleg.gradients.rank_group import RankGroup
from pipeline.stage import Context, write_json
from stages.tensor_files import load_tensors, save_tensors, with_prefix, without_prefix

_FORMAT = 1
_DOCUMENT = "checkpoint.json"
_TENSORS = "checkpoint.safetensors"

State = Mapping[str, Any]
"""A state dict: under "tensors", name -> tensor; under "meta", JSON, where there is any."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a stage needs to resume bit-identically.

    Attributes:
        cursor: the place that the stage has reached, as JSON.
        states: name without a dot -> state.
        folders: name -> folder whose files belong to the checkpoint.
    """

    cursor: Mapping[str, Any] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)

    def write(self, ctx: Context) -> None:
        """Make this the newest checkpoint of the cell; see `Context.checkpoint`."""
        tensors: dict[str, Tensor] = {}
        for name, state in self.states.items():
            tensors |= with_prefix(name, state["tensors"])
        document = {
            "format": _FORMAT,
            "cursor": self.cursor,
            "states": {name: state.get("meta") for name, state in self.states.items()},
        }
        with ctx.checkpoint() as folder:
            save_tensors(folder / _TENSORS, tensors)
            write_json(folder / _DOCUMENT, document)
            for name, source in self.folders.items():
                shutil.copytree(source, folder / name)

    @classmethod
    def last(cls, ctx: Context) -> Checkpoint | None:
        """Return the newest checkpoint of the cell, its tensors on the CPU; None without one.

        A checkpoint in another version's format is ignored, with a line in the cell's log. Errors
        are those of `load_tensors`.
        """
        folder = ctx.last_checkpoint()
        if folder is None:
            return None
        document = _read(folder / _DOCUMENT)
        if document.get("format") != _FORMAT:
            ctx.say(
                "the checkpoint was written by another version, in a format that this one does not "
                "read; the stage begins from its start"
            )
            return None
        # Linear algebra may round otherwise where a tensor is not aligned, as in a file.
        tensors = {name: one.clone() for name, one in load_tensors(folder / _TENSORS).items()}
        return cls(
            cursor=document["cursor"],
            states={
                name: {"tensors": without_prefix(name, tensors), "meta": meta}
                for name, meta in document["states"].items()
            },
            folders={path.name: path for path in folder.iterdir() if path.is_dir()},
        )

    @classmethod
    def shared(cls, ctx: Context, rank_group: RankGroup) -> Checkpoint | None:
        """Return the first rank's newest checkpoint on all ranks, without its folders elsewhere.

        Every rank must call this. None where there is none.
        """
        last = cls.last(ctx)
        if rank_group.size == 1 or not rank_group.any(last is not None):
            return last
        own = last or cls()
        tensors = {
            f"{name}.{key}": one
            for name, state in own.states.items()
            for key, one in state["tensors"].items()
        }
        metas = {name: state["meta"] for name, state in own.states.items()}
        found, (cursor, metas) = rank_group.broadcast(tensors, [dict(own.cursor), metas])
        states = {
            name: {"tensors": without_prefix(name, found), "meta": meta}
            for name, meta in metas.items()
        }
        return cls(cursor=cursor, states=states, folders=own.folders)

    def tensors(self, name: str, device: str = "cpu") -> dict[str, Tensor]:
        """Return the tensors of a state on `device`."""
        return {key: one.to(device) for key, one in self.states[name]["tensors"].items()}

    def state(self, name: str, device: str) -> State:
        """Return a state with its tensors on `device`."""
        return {**self.states[name], "tensors": self.tensors(name, device)}


def share(rank_group: RankGroup, state: State, device: str = "cpu") -> State:
    """Return the state that the first process of a rank group gives, with its tensors on `device`.

    Every process must call this; the states of the others are ignored.
    """
    tensors = {name: one.to(device) for name, one in state["tensors"].items()}
    found, meta = rank_group.broadcast(tensors, state.get("meta"), device=device)
    return {"tensors": found, "meta": meta}


def _read(path: Path) -> dict[str, Any]:
    """Return a checkpoint's document; an empty one where there is none, as in older formats."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
