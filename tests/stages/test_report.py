"""Evaluation, selection, table and figure."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running_stages import Ran, artifact, run_stage

from pipeline.stage import Artifact, StageError, write_json
from stages.model_folder import load_model, save_model
from stages.report.summary import summarise
from stages.report.table import markdown


def test_evaluate_gives_a_row_and_a_record_each(dense: Ran, tmp_path: Path) -> None:
    models = [
        artifact(dense.output(), cell="pretrain[seed=0]", seed=0),
        artifact(None, cell="oneshot[method=obs,seed=0,sparsity=0.9]", method="obs", sparsity=0.9),
        artifact(dense.output(), cell="pretrain[seed=1]", seed=1),
    ]
    ran = run_stage("evaluate", tmp_path, {}, {"models": models})
    rows = json.loads((ran.output("results") / "rows.json").read_text())
    assert [row["model_cell"] for row in rows] == ["pretrain[seed=0]", "pretrain[seed=1]"]
    row = rows[0]
    assert row["split"] == "test"
    assert row["nonzero"] == row["prunable"] < row["parameters"]
    assert 50 < row["accuracy"] <= 100
    assert row["nll"] > 0
    assert 0 <= row["ece"] < 50
    failed = json.loads((ran.output("results") / "failed.json").read_text())
    assert [one["model_cell"] for one in failed] == [models[1].cell]
    record = ran.records()[0]
    assert record["name"] == "pretrain[seed=0]"
    assert record["params"]["method"] == "dense"
    assert record["metrics"]["accuracy"] == row["accuracy"]
    assert record["metrics"]["sparsity"] == 0


def test_evaluate_goes_on_where_it_was_killed(dense: Ran, tmp_path: Path) -> None:
    models = [artifact(dense.output(), cell=f"m{i}") for i in range(2)]
    done = {"m0": {**ROW, "model_cell": "m0", "accuracy": 12.5}}
    checkpoint = tmp_path / "checkpoints" / "000001"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "rows.json", done)
    ran = run_stage("evaluate", tmp_path, {}, {"models": models})
    rows = json.loads((ran.output("results") / "rows.json").read_text())
    assert rows[0]["accuracy"] == 12.5
    assert rows[1]["accuracy"] > 50
    assert [record["name"] for record in ran.records()] == ["m0", "m1"]


def test_select_passes_on_the_best(dense: Ran, tmp_path: Path) -> None:
    worse = tmp_path / "worse"
    worse.mkdir()
    model = load_model(dense.output(), "cpu")
    model.network.get_parameter("fc2.weight").data.neg_()
    save_model(worse, model.with_facts(damping=0.1))
    candidates = [
        artifact(worse, cell="oneshot[damping=0.1]"),
        artifact(None, cell="oneshot[damping=0.2]"),
        artifact(dense.output(), cell="oneshot[damping=0.3]"),
    ]
    ran = run_stage("select", tmp_path / "run", {"metric": "nll"}, {"candidates": candidates})
    facts = json.loads((ran.output() / "model.json").read_text())
    assert facts["selected"] == "oneshot[damping=0.3]"
    assert facts["damping"] is None
    load_model(ran.output(), "cpu")
    with pytest.raises(StageError, match="every candidate failed"):
        run_stage("select", tmp_path / "none", {}, {"candidates": [artifact(None)]})


ROW: dict[str, Any] = {
    "key": "",
    "method": "fishleg",
    "structure": None,
    "mode": "oneshot",
    "finetuned": False,
    "target": 0.9,
    "sparsity": 0.9,
    "seed": 0,
    "damping": 1e-4,
    "split": "test",
    "accuracy": 90.0,
    "nll": 0.5,
    "ece": 1.0,
    "nonzero": 10,
    "prunable": 100,
    "parameters": 110,
}


def row(**changes: Any) -> dict[str, Any]:
    merged = {**ROW, **changes}
    axes = ",".join(f"{axis}={merged[axis]}" for axis in ("method", "seed", "sparsity"))
    return {"model_cell": f"{merged['mode']}[{axes}]", **merged}


def results_folder(path: Path, rows: list[Any], failed: list[Any]) -> Artifact:
    path.mkdir()
    write_json(path / "rows.json", rows)
    write_json(path / "failed.json", failed)
    return artifact(path, cell="evaluate")


def test_the_table_has_means_spreads_the_best_and_the_failed(tmp_path: Path) -> None:
    rows = [
        row(method="dense", mode="dense", sparsity=0.0, accuracy=97.0),
        row(accuracy=90.0),
        row(seed=1, accuracy=92.0),
        row(method="obs", accuracy=95.0),
        row(method="magnitude", mode="gradual", finetuned=True, accuracy=99.0),
    ]
    lost = "oneshot[method=obs,seed=1,sparsity=0.9]"
    failed = [{"model_cell": lost, "axes": {"method": "obs", "sparsity": 0.9, "seed": 1}}]
    ran = run_stage(
        "compare",
        tmp_path / "run",
        {"published": [{"method": "CBS", "sparsity": [0.5, 0.9], "accuracy": [99.0, 98.0]}]},
        {"results": [results_folder(tmp_path / "rows", rows, failed), artifact(None, cell="late")]},
    )
    report = ran.output("report")
    table = (report / "table.md").read_text()
    assert "Dense network: 97.00 % accuracy." in table
    assert "| method | 0.5 | 0.9 |" in table
    assert "| fishleg |  | 91.00 ± 1.00 |" in table
    assert "| obs |  | **95.00** † |" in table
    assert "| *CBS (published)* | 99.00 | 98.00 |" in table
    assert "## Gradual, then fine-tuned" in table
    assert f"- `{lost}`\n- `late`" in table
    lines = list(csv.DictReader((report / "table.csv").read_text().splitlines()))
    assert [float(line["accuracy"]) for line in lines] == [97.0, 90.0, 92.0, 95.0, 99.0]
    with Image.open(report / "figure.png") as figure:
        assert figure.width > figure.height > 500


def test_a_method_without_any_result_is_shown_as_failed() -> None:
    lost = [{"model_cell": "oneshot[...]", "axes": {"method": "kfac", "sparsity": 0.5}}]
    table = markdown(summarise([row(sparsity=0.5)], lost), "title")
    assert "| kfac | failed † |" in table


def test_several_structures_of_a_method_are_lines_of_their_own() -> None:
    rows = [row(structure="eigen"), row(structure="kronecker", sparsity=0.8), row(method="obs")]
    lines = summarise(rows).sections["One-shot"]
    assert list(lines) == ["fishleg (eigen)", "fishleg (kronecker)", "obs"]
    assert list(summarise([rows[0], rows[2]]).sections["One-shot"]) == ["fishleg", "obs"]


def test_several_dampings_of_a_method_are_lines_of_their_own() -> None:
    summary = summarise([row(), row(damping=1e-2, accuracy=80.0), row(method="obs")])
    assert list(summary.sections["One-shot"]) == [
        "fishleg (damping 0.0001)",
        "fishleg (damping 0.01)",
        "obs",
    ]


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no model was evaluated"):
        run_stage("compare", tmp_path, {}, {"results": [artifact(None)]})


def test_published_rows_need_as_many_accuracies_as_sparsities() -> None:
    from stages.catalogue import Published

    with pytest.raises(ValueError, match="CBS: 2 sparsities, 1 accuracies"):
        Published(method="CBS", sparsity=[0.5, 0.9], accuracy=[1.0])
