"""Evaluation, table and figure."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running_stages import Ran, artifact, run_stage

from pipeline.stage import Artifact, Context, StageError, write_json
from stages.answers import unpack
from stages.checkpoint import Checkpoint
from stages.columns import COLUMNS
from stages.lineage import Step, seeds, settings
from stages.report.summary import summarise
from stages.report.table import markdown, table_csv


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
    flags = unpack(row["right"], row["images"])
    assert 100 * flags.mean() == pytest.approx(row["accuracy"], abs=1e-12)
    assert rows[1]["images_digest"] == row["images_digest"]
    assert row["nonzero"] == row["prunable"] < row["parameters"]
    assert 50 < row["accuracy"] <= 100
    assert row["nll"] > 0
    assert 0 <= row["ece"] < 50
    failed = json.loads((ran.output("results") / "failed.json").read_text())
    assert [one["model_cell"] for one in failed] == [models[1].cell]
    measured = [column for column in COLUMNS if not column.by_runner]
    assert row.keys() == {column.name for column in measured}
    for column in measured:
        value = row[column.name]
        assert (column.optional and value is None) or type(value) is column.kind, column.name
    record = ran.records()[0]
    assert record["params"]["label"] == "dense"
    assert {column.name for column in COLUMNS if column.param} <= record["params"].keys()
    tracked = {column.name for column in COLUMNS if column.metric and not column.optional}
    assert record["metrics"].keys() == tracked
    assert record["name"] == "pretrain[seed=0]"
    assert record["params"]["method"] == "dense"
    assert record["metrics"]["accuracy"] == row["accuracy"]
    assert record["metrics"]["sparsity"] == 0


def test_evaluate_resumes_where_it_was_killed(dense: Ran, tmp_path: Path) -> None:
    models = [artifact(dense.output(), cell=f"m{i}") for i in range(2)]
    further = {"settings": {}, "seeds": {}, "emptied": [], "warnings": []}
    done = {"m0": {**ROW, **further, "model_cell": "m0", "accuracy": 12.5}}
    Checkpoint(cursor={"rows": done}).write(Context(params=None, folder=tmp_path))
    ran = run_stage("evaluate", tmp_path, {}, {"models": models})
    rows = json.loads((ran.output("results") / "rows.json").read_text())
    assert rows[0]["accuracy"] == 12.5
    assert rows[1]["accuracy"] > 50
    assert [record["name"] for record in ran.records()] == ["m0", "m1"]


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
        row(accuracy=90.9),
        row(seed=1, accuracy=91.1),
        row(method="obs", accuracy=97.9),
        row(method="magnitude", mode="gradual", finetuned=True, accuracy=99.0),
    ]
    rows = [{**one, "images": 10_000} for one in rows]
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
    assert "| method | n | 0.5 | 0.9 |" in table
    assert "| fishleg | 2 |  | 91.00 ± 0.14 |" in table
    assert "| obs | 1 |  | **97.90** † |" in table
    assert "| *CBS (published)* |  | 99.00 | **98.00** |" in table
    assert "## Gradual, then fine-tuned" in table
    assert f"- `{lost}`\n- `late`" in table
    lines = list(csv.DictReader((report / "table.csv").read_text().splitlines()))
    assert [float(line["accuracy"]) for line in lines] == [97.0, 90.9, 91.1, 97.9, 99.0]
    with Image.open(report / "figure.png") as figure:
        assert figure.width > figure.height > 500


def test_the_legend_computes_the_deviation_that_the_draw_of_the_images_gives() -> None:
    rows = [row(accuracy=90.0, images=10_000), row(accuracy=50.0, images=10_000, sparsity=0.5)]
    table = markdown(summarise(rows), "title")
    assert "An accuracy a on N = 10,000 images" in table
    assert "0.30 to 0.50 points here" in table
    assert "points here" not in markdown(summarise([row()]), "title")


def test_a_model_whose_evaluation_failed_is_marked_in_its_place(tmp_path: Path) -> None:
    """An evaluation in a cell of its own has the axes of the model's cell."""
    done = results_folder(tmp_path / "rows", [row(), row(seed=1)], [])
    cells = {name: f"measure[method={name},sparsity=0.9]" for name in ("fishleg", "kfac")}
    lost = artifact(None, cell=cells["kfac"], method="kfac", sparsity=0.9)
    object.__setattr__(done, "stage", "measure")
    ran = run_stage("compare", tmp_path / "run", {}, {"results": [done, lost]})
    table = (ran.output("report") / "table.md").read_text()
    assert "| fishleg | 2 | 90.00 ± 0.00 |" in table
    assert "| kfac | 0 | failed † |" in table
    assert f"- `{cells['kfac']}`" in table


def test_a_method_without_any_result_is_shown_as_failed() -> None:
    lost = [{"model_cell": "oneshot[...]", "axes": {"method": "kfac", "sparsity": 0.5}}]
    table = markdown(summarise([row(sparsity=0.5)], lost), "title")
    assert "| kfac | 0 | failed † |" in table


def test_several_structures_of_a_method_are_lines_of_their_own() -> None:
    rows = [row(structure="eigen"), row(structure="kronecker", sparsity=0.8), row(method="obs")]
    lines = summarise(rows).sections["One-shot"]
    assert list(lines) == ["eigen", "fishleg (kronecker)", "obs"]
    assert list(summarise([rows[0], rows[2]]).sections["One-shot"]) == ["eigen", "obs"]


def test_the_line_of_eigen_is_called_eigen_in_rows_of_earlier_versions_too() -> None:
    """There it was method fishleg in structure eigen."""

    def line(method: str, structure: str | None, **curvature: Any) -> Any:
        return made(
            f"{method} {structure} {curvature}",
            90.0,
            method=method,
            structure=structure,
            curvature=curvature,
        )

    rows = [line("fishleg", "eigen", shrinkage=one) for one in (0.0, 0.5)]
    assert list(summarise(rows[:1]).sections["One-shot"]) == ["eigen"]
    assert list(summarise([line("eigen", None)]).sections["One-shot"]) == ["eigen"]
    rows += [line("fishleg", "full"), line("fls", "tensor"), line("kfac", None)]
    lines = summarise(rows).sections["One-shot"]
    assert list(lines) == [
        "eigen (shrinkage 0)",
        "eigen (shrinkage 0.5)",
        "fishleg (full)",
        "fls (tensor)",
        "kfac",
    ]


def test_a_structure_that_was_chosen_is_not_the_name_of_the_line() -> None:
    chosen = Step(stage="select", among={"curvature.structure": ["eigen", "kronecker"]})
    row = made("a", 90.0, structure="eigen", then=[chosen])
    assert list(summarise([row]).sections["One-shot"]) == ["fishleg (best of eigen, kronecker)"]


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


# ------------------------------------------------------------------- what is averaged, and what not


def made(name: str, accuracy: float, seed: int = 0, target: float = 0.9, **changes: Any) -> Any:
    """Return a row as `evaluate` writes it, of a model whose curvature had these settings."""
    curvature = {"method": "fishleg", "labels": "matched", "samples": 100, "damping": 1e-4}
    lineage = [
        Step(stage="pretrain", params={"epochs": 3, "lr": 0.1}, seeds={"seed": seed}),
        Step(stage="curvature", params={**curvature, **changes.pop("curvature", {})}),
        Step(
            stage="prune_oneshot",
            params={"selection": "single", **changes.pop("pruning", {})},
            seeds={"seed": seed},
            target={"sparsity": target},
        ),
        *changes.pop("then", ()),
    ]
    cell = f"{name}[seed={seed},sparsity={target}]"
    told = {"settings": settings(lineage), "seeds": seeds(lineage), "target": target, "seed": seed}
    return {**ROW, "model_cell": cell, "key": cell, "accuracy": accuracy, **told, **changes}


def test_a_grid_that_was_extended_for_one_sparsity_is_no_line_of_its_own() -> None:
    rows = []
    for target, grid in ((0.5, [1e-4, 1e-3]), (0.9, [1e-4, 1e-3, 1e-2])):
        chosen = Step(stage="select", among={"curvature.damping": grid})
        rows.append(made("best", 90.0, target=target, then=[chosen]))
    (name,) = lines_of(rows)
    assert "damping" not in name


def lines_of(rows: list[Any]) -> dict[str, dict[float, tuple[float, ...]]]:
    (lines,) = summarise(rows).sections.values()
    return {
        name: {target: point.accuracies for target, point in points.items()}
        for name, points in lines.items()
    }


@pytest.mark.parametrize(
    ("difference", "names"),
    [
        ({"curvature": {"labels": "empirical"}}, ("labels matched", "labels empirical")),
        ({"pruning": {"selection": "greedy"}}, ("selection single", "selection greedy")),
        ({"curvature": {"samples": 10, "rank": 3}}, ("samples 100", "samples 10, rank 3")),
        ({"split": "validation"}, ("split test", "split validation")),
    ],
    ids=str,
)
def test_only_seeds_are_averaged_and_whatever_else_differs_is_a_line(
    difference: dict[str, Any], names: tuple[str, str]
) -> None:
    rows = [made("a", 90.0 + seed, seed) for seed in (0, 1)]
    rows += [made("b", 60.0 + seed, seed, **difference) for seed in (0, 1)]
    assert lines_of(rows) == {
        f"fishleg ({names[0]})": {0.9: (90.0, 91.0)},
        f"fishleg ({names[1]})": {0.9: (60.0, 61.0)},
    }
    assert list(lines_of(rows[:2])) == ["fishleg"]


def test_settings_that_change_along_a_line_make_two_lines() -> None:
    """No two rows of one place differ, but a line through both would be of two recipes."""
    rows = [made("a", 95.0, target=0.5), made("b", 90.0, pruning={"selection": "greedy"})]
    assert list(lines_of(rows)) == ["fishleg (selection single)", "fishleg (selection greedy)"]


def test_several_stages_with_one_parameter_are_told_apart_by_name() -> None:
    tuned = [
        made(f"a{epochs}", 9.0, then=[Step(stage="finetune", params={"epochs": epochs})])
        for epochs in (1, 5)
    ]
    assert list(lines_of(tuned)) == ["fishleg (finetune.epochs 1)", "fishleg (finetune.epochs 5)"]


def test_other_ways_to_a_model_are_other_lines() -> None:
    """The same method and section by two stages that have no parameter in common."""
    rows = [made("a", 90.0), made("b", 80.0, then=[Step(stage="pick", params={"within": 1.0})])]
    assert list(lines_of(rows)) == ["fishleg (prune_oneshot)", "fishleg (pick)"]


def test_what_was_chosen_is_no_difference_but_what_it_was_chosen_from_is() -> None:
    def chosen(accuracy: float, target: float, damping: float, among: list[float]) -> Any:
        step = Step(stage="select", among={"curvature.damping": among})
        row = made("best", accuracy, target=target, curvature={"damping": damping}, then=[step])
        return {**row, "damping": damping, "key": f"{row['key']} {among}"}

    rows = [chosen(95.0, 0.5, 0.1, [0.1, 1e-3]), chosen(90.0, 0.9, 1e-3, [0.1, 1e-3])]
    assert lines_of(rows) == {"fishleg": {0.5: (95.0,), 0.9: (90.0,)}}
    rows.append(chosen(91.0, 0.9, 1e-3, [1e-3, 1e-5]))
    assert [name.partition("best of ")[2] for name in lines_of(rows)] == [
        "0.1, 0.001)",
        "0.001, 1e-05)",
    ]


def test_models_that_nothing_tells_apart_are_lines_by_their_cells() -> None:
    rows = [made("a", 90.0), made("b", 60.0)]
    assert list(lines_of(rows)) == ["fishleg (a)", "fishleg (b)"]
    old = [row(accuracy=90.0), {**row(accuracy=60.0), "model_cell": "oneshot[labels=x]"}]
    assert len(lines_of(old)) == 2


def test_a_model_that_was_evaluated_twice_counts_once() -> None:
    assert lines_of([made("a", 90.0), made("a", 90.0)]) == {"fishleg": {0.9: (90.0,)}}


def test_dense_networks_that_differ_are_not_averaged(tmp_path: Path) -> None:
    def dense(epochs: int, seed: int, accuracy: float) -> Any:
        lineage = [Step(stage="pretrain", params={"epochs": epochs}, seeds={"seed": seed})]
        about = {"method": "dense", "mode": "dense", "settings": settings(lineage)}
        return {**made(f"{epochs}", accuracy, seed, 0.0), **about, "seeds": seeds(lineage)}

    table = markdown(summarise([dense(3, 0, 90.0), dense(3, 1, 92.0), dense(9, 0, 99.0)]), "t")
    assert "Dense network (epochs 3): 91.00 ± 1.41 % accuracy." in table
    assert "Dense network (epochs 9): 99.00 % accuracy." in table


def test_rows_of_before_there_were_targets_stay_readable() -> None:
    old = {**ROW, "model_cell": "oneshot", "sparsity": 0.9}
    del old["target"]
    (points,) = summarise([old]).sections["One-shot"].values()
    assert points[0.9].accuracies == (90.0,)
    assert table_csv([old]).splitlines()[1].startswith("oneshot,,fishleg,,oneshot,False,0.9,0.9,")


def test_a_warning_is_marked_in_its_place_and_told_below() -> None:
    rows = [
        made("a", 90.0),
        made("a", 10.0, seed=1, emptied=["head"], unprunable={"embed.weight": "of an embedding"}),
        made("c", 95.0, target=0.5),
    ]
    table = markdown(summarise(rows), "title")
    assert "| fishleg | 1 to 2 | 95.00 | 50.00 ± 56.57 ⚠ |" in table
    told = "⚠ Read with care:\n\n- Layers that have lost every weight: head. "
    assert f"{told}(`{rows[1]['model_cell']}`)" in table
    assert "- `embed.weight`: of an embedding" in table
    assert "⚠" not in markdown(summarise(rows[:1]), "title")


def test_the_csv_has_a_column_for_whatever_tells_models_apart() -> None:
    rows = [row(settings={"damping": 1e-4, "steps": [1, 2]}), row(settings={"selection": "greedy"})]
    lines = list(csv.DictReader(table_csv(rows).splitlines()))
    found = [(x["settings.damping"], x["settings.steps"], x["settings.selection"]) for x in lines]
    assert found == [("0.0001", "[1, 2]", ""), ("", "", "greedy")]
