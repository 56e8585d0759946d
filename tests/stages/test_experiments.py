"""The pipelines that come with the project: every one is valid, and runs on a small subset."""

import json
from pathlib import Path

import pytest
from running_stages import run_cells
from test_data import write_binary, write_tree

from pipeline.planning.planner import make_plan
from pipeline.spec.load import load_spec
from pipeline.store.store import Store

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
SMALL = [
    "vars.gpus=0",
    "vars.width=4",
    "vars.subset=16",
    "vars.epochs=1",
    "vars.seeds=[0]",
    "vars.sparsities=[0.5]",
    "vars.methods=[fishleg, magnitude]",
    "vars.samples=8",
    "vars.steps=2",
    "vars.epochs_per_step=1",
    "vars.finetuning_epochs=1",
    "vars.fishleg={structure: tensor_scaled, warm_start: moments, steps: 3, refine_steps: 2}",
]


PIPELINES = [ROOT / "pipeline.yaml", *sorted(EXPERIMENTS.glob("*.yaml"))]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_pipeline_is_valid_and_runnable_by_itself(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mlpnet_mnist", "resnet20_cifar10"):
        (tmp_path / f"{name}.safetensors").touch()  # its digest is all that planning needs
    monkeypatch.setenv("FISHLEG_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("FISHLEG_DATA", "nowhere")
    plan = make_plan(load_spec(path), Store(str(tmp_path / "empty")))
    assert {cell.state for cell in plan.cells} == {"run"}
    assert path.read_text().startswith("#!/usr/bin/env -S python -m pipeline run\n")
    assert path.stat().st_mode & 0o111


def test_a_further_model_of_the_main_pipeline_measures_no_other_one_again(tmp_path: Path) -> None:
    keys = []
    for sparsities in ("[0.9, 0.95]", "[0.5, 0.9, 0.95]"):
        spec = load_spec(ROOT / "pipeline.yaml", [f"vars.sparsities={sparsities}"])
        cells = make_plan(spec, Store(str(tmp_path / "empty"))).cells
        measured = [one for one in cells if one.cell.declaration.name == "evaluate"]
        assert all(len(one.cell.sources) == 1 for one in measured)
        keys.append({one.cell.name: one.key for one in measured})
    assert keys[0].items() < keys[1].items()


def rows_of(done: dict[str, Path]) -> list[tuple[str, str, bool]]:
    rows = json.loads((done["evaluate"] / "results" / "rows.json").read_text())
    assert (done["compare"] / "report" / "figure.png").exists()
    return sorted((row["method"], row["mode"], row["finetuned"]) for row in rows)


ROWS = sorted(
    [("dense", "dense", False)]
    + [
        (method, *kind)
        for method in ("fishleg", "magnitude")
        for kind in (("oneshot", False), ("oneshot", True), ("gradual", False))
    ]
)


def test_resnet18_on_a_few_images_in_cifar10s_binary_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_binary(tmp_path)
    monkeypatch.setenv("FISHLEG_DATA", str(tmp_path))
    settings = [*SMALL, "dense.verify=false"]  # these are not the published images
    done = run_cells(EXPERIMENTS / "cifar10_resnet18.yaml", tmp_path / "run", settings)
    assert rows_of(done) == ROWS


def test_resnet18_on_a_small_tree_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "pets", {"train": 12, "val": 4, "test": 4})
    monkeypatch.setenv("FISHLEG_DATA", str(tmp_path))
    settings = [*SMALL, "dense.dataset=folder:pets"]
    done = run_cells(EXPERIMENTS / "tinyimagenet_resnet18.yaml", tmp_path / "run", settings)
    assert rows_of(done) == ROWS


def test_a_published_checkpoint_is_imported_pruned_and_selected(
    assets: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHLEG_DATA", str(published))
    monkeypatch.setenv("FISHLEG_CHECKPOINTS", str(assets / "checkpoints"))
    settings = [
        "vars.subset=500",
        "vars.methods=[kfac]",
        "vars.dampings=[1e-3, 1.0]",
        "vars.sparsities=[0.9]",
        "vars.samples=200",
    ]
    done = run_cells(EXPERIMENTS / "mnist_mlp.yaml", tmp_path / "run", settings)
    rows = json.loads((done["evaluate"] / "results" / "rows.json").read_text())
    accuracy = {row["method"]: row["accuracy"] for row in rows}
    assert accuracy["dense"] > 90
    assert accuracy["kfac"] > accuracy["magnitude"]
    chosen = json.loads((done["best[method=kfac,sparsity=0.9]"] / "model/model.json").read_text())
    assert (chosen["damping"], chosen["nonzero"]) == (0.001, 3236)
    table = (done["compare"] / "report" / "table.md").read_text()
    assert "| *CBS (published)* |  | " in table
