"""Selection of the best candidate, and values at the ends of their grids."""

import json
from pathlib import Path
from typing import Any

import pytest
from running_stages import Ran, artifact, run_stage

from pipeline.stage import Artifact, StageError
from stages.lineage import Step
from stages.model_folder import load_model, save_model
from stages.report.summary import summarise
from stages.report.table import markdown


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


def candidates(dense: Ran, folder: Path, dampings: list[float], harm: list[bool]) -> list[Artifact]:
    """Return equal models but for their dampings, and that some are harmed."""
    found = []
    for damping, harmed in zip(dampings, harm, strict=True):
        model = load_model(dense.output(), "cpu")
        if harmed:
            model.network.get_parameter("fc2.weight").data.neg_()
        at = folder / f"{damping:g}"
        at.mkdir()
        step = Step(stage="curvature", params={"damping": damping, "method": "obs"})
        save_model(at, model.after(step, damping=damping))
        found.append(artifact(at, cell=f"oneshot[damping={damping:g}]"))
    return found


def test_select_warns_of_a_value_at_an_end_of_its_grid(dense: Ran, tmp_path: Path) -> None:
    models = candidates(dense, tmp_path, [0.1, 0.01, 0.001], [True, True, False])
    ran = run_stage("select", tmp_path / "run", {}, {"candidates": models})
    told = "The chosen curvature.damping, 0.001, is the lower end of its grid, 0.001 to 0.1"
    assert f"oneshot[damping=0.001]: {told}" in ran.texts()
    (warning,) = json.loads((ran.output() / "model.json").read_text())["warnings"]
    assert warning.startswith(told)
    row = evaluated(ran.output(), tmp_path / "evaluate")
    assert row["warnings"] == [warning]
    among = {"chosen": 0.001, "among": [0.1, 0.01, 0.001]}
    assert row["choices"] == {"curvature.damping": among}
    assert f"⚠ Read with care:\n\n- {warning}" in markdown(
        summarise([{**row, "mode": "oneshot"}]), "t"
    )


def test_select_prefers_a_value_inside_its_grid_to_an_equal_one_at_an_end(
    dense: Ran, tmp_path: Path
) -> None:
    models = candidates(dense, tmp_path, [0.1, 0.01, 0.001], [False, False, False])
    ran = run_stage("select", tmp_path / "run", {}, {"candidates": models})
    facts = json.loads((ran.output() / "model.json").read_text())
    assert facts["selected"] == "oneshot[damping=0.01]"
    assert facts["warnings"] == []


def evaluated(model: Path, folder: Path) -> dict[str, Any]:
    """Return the row of one model."""
    ran = run_stage("evaluate", folder, {}, {"models": [artifact(model)]})
    (row,) = json.loads((ran.output("results") / "rows.json").read_text())
    return row


def test_select_by_divergence_prefers_the_model_nearest_to_the_dense_one(
    dense: Ran, tmp_path: Path
) -> None:
    """A model of scaled outputs classifies alike, and diverges."""
    models = []
    for scale in (3.0, 1.01, 0.3):
        model = load_model(dense.output(), "cpu")
        model.network.get_parameter("fc2.weight").data.mul_(scale)
        model.network.get_parameter("fc2.bias").data.mul_(scale)
        folder = tmp_path / f"{scale:g}"
        folder.mkdir()
        step = Step(stage="curvature", params={"damping": scale, "method": "obs"})
        save_model(folder, model.after(step, damping=scale))
        models.append(artifact(folder, cell=f"oneshot[damping={scale:g}]"))
    inputs = {"candidates": models, "dense": [artifact(dense.output())]}
    ran = run_stage("select", tmp_path / "run", {"metric": "divergence"}, inputs)
    facts = json.loads((ran.output() / "model.json").read_text())
    assert facts["selected"] == "oneshot[damping=1.01]"
    with pytest.raises(StageError, match="add the input `dense`"):
        run_stage("select", tmp_path / "no", {"metric": "divergence"}, {"candidates": models})
