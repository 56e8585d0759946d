"""In-stage checkpoints: what is written comes back, and other versions' are ignored with a line."""

from pathlib import Path

import pytest
import torch
from running_stages import TINY, Ran, run_stage
from safetensors.torch import save_file

from pipeline.stage import Context, write_json
from stages.checkpoint import Checkpoint

IGNORED = "written by another version"
EARLIER = {
    "pretrain": ("training.json", "training.safetensors"),
    "curvature": ("curvature.json", "curvature.safetensors"),
    "prune_gradual": ("step.json", "masks.safetensors", "training.json", "training.safetensors"),
    "prune_multistep": ("step.json", "masks.safetensors", "multistep.safetensors"),
    "evaluate": ("rows.json",),
}
"""Stage type -> files of a checkpoint of the first format."""


def test_states_cursor_and_folders_come_back(tmp_path: Path) -> None:
    kept = tmp_path / "models"
    kept.mkdir()
    (kept / "note").write_text("1")
    shared = torch.arange(6.0)
    tensors = {"a.b": shared, "c": shared[2:], "mask": torch.tensor([True, False]), "n": shared[0]}
    states = {"one": {"tensors": tensors, "meta": {"done": 3}}, "two": {"tensors": {}}}
    written = Checkpoint(cursor={"step": 2}, states=states, folders={"kept": kept})
    written.write(Context(params=None, folder=tmp_path))
    found = Checkpoint.last(Context(params=None, folder=tmp_path))
    assert found is not None
    assert found.cursor == {"step": 2}
    assert found.state("one", "cpu")["meta"] == {"done": 3}
    assert found.tensors("one").keys() == tensors.keys()
    for name, tensor in found.tensors("one").items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
        assert tensor.data_ptr() % 64 == 0  # linear algebra may round otherwise where it is not
    assert found.state("two", "cpu") == {"tensors": {}, "meta": None}
    assert (found.folders["kept"] / "note").read_text() == "1"


def test_a_cell_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    assert Checkpoint.last(Context(params=None, folder=tmp_path)) is None


@pytest.mark.parametrize("document", ['{"format": 99}', "[]", "{"])
def test_a_document_of_another_format_is_ignored(tmp_path: Path, document: str) -> None:
    folder = tmp_path / "checkpoints" / "000001"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(document)
    texts: list[str] = []
    ctx = Context(params=None, folder=tmp_path, emit=lambda event: texts.append(event["text"]))
    assert Checkpoint.last(ctx) is None
    assert len(texts) == 1 and IGNORED in texts[0]


@pytest.mark.parametrize("stage", EARLIER)
def test_a_stage_begins_from_its_start_beside_an_earlier_versions_checkpoint(
    stage: str, dense: Ran, tmp_path: Path
) -> None:
    quick = {"method": "magnitude", "samples": 20, "batch_size": 20}
    params = {
        "pretrain": {**TINY, "epochs": 1},
        "curvature": {**quick, "certificate_samples": 0},
        "prune_gradual": {**quick, "sparsity": 0.5, "steps": 2, "epochs": 0},
        "prune_multistep": {**quick, "sparsity": 0.5, "steps": 2, "refine": "none"},
        "evaluate": {},
    }[stage]
    inputs = {"pretrain": {}, "evaluate": {"models": dense.output()}}
    connected = inputs.get(stage, {"model": dense.output()})
    folder = tmp_path / "resumed" / "checkpoints" / "000001"
    folder.mkdir(parents=True)
    for file in EARLIER[stage]:
        if file.endswith(".json"):
            write_json(folder / file, {"epoch": 1, "step": 1, "fitting": False, "meta": {}})
        else:
            save_file({"network.fc1.weight": torch.ones(2)}, folder / file)
    whole = run_stage(stage, tmp_path / "whole", params, connected)
    again = run_stage(stage, tmp_path / "resumed", params, connected)
    assert again.texts().count(IGNORED) == 1
    for output in sorted((whole.folder / "outputs").rglob("*")):
        if output.is_file():
            copy = again.folder / output.relative_to(whole.folder)
            assert copy.read_bytes() == output.read_bytes(), output.name
