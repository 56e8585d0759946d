"""Nothing is done on less than was asked for without a word: in log, model.json and row."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running_stages import TINY, Ran, artifact, run_stage
from torch import nn
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.planning.inspection import inspect
from pipeline.spec.load import load_spec
from pipeline.stage import StageError
from stages.lineage import settings
from stages.model_folder import load_model, save_model

MAGNITUDE = {"method": "magnitude", "samples": 20, "certificate_samples": 0}


class Tied(nn.Module):
    """Reads the digits' pixels as ids; its head is tied to its embedding."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.embed = nn.Embedding(num_classes, 6)
        self.mix = nn.Linear(64, 6)
        self.head = nn.Linear(6, num_classes, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(images.flatten(1)) + self.embed.weight.mean(0))


def model_of(folder: Path, network: str, **params: Any) -> Path:
    given = {"dataset": "digits", "model": f"test_nothing_on_less:{network}", "epochs": 0}
    return run_stage("pretrain", folder, {**given, **params}).output()


def pruned(folder: Path, model: Path, **params: Any) -> Ran:
    estimate = run_stage("curvature", folder / "curvature", MAGNITUDE, {"model": model})
    inputs = {"model": model, "curvature": estimate.output("curvature")}
    return run_stage("prune_oneshot", folder / "p", {"certificate_samples": 0, **params}, inputs)


def facts_of(ran: Ran) -> Any:
    return json.loads((ran.output() / "model.json").read_text())


def row_of(folder: Path, model: Path) -> Any:
    ran = run_stage("evaluate", folder, {}, {"models": [artifact(model, cell="pruned")]})
    return json.loads((ran.output("results") / "rows.json").read_text())[0], ran


def test_what_is_not_prunable_is_in_log_model_and_row(tmp_path: Path) -> None:
    ran = pruned(tmp_path, model_of(tmp_path / "m", "Tied"), sparsity=0.5)
    facts = facts_of(ran)
    row, _ = row_of(tmp_path / "e", ran.output())
    assert list(facts["unprunable"]) == ["embed.weight"]
    assert row["unprunable"] == facts["unprunable"]
    assert f"embed.weight ({facts['unprunable']['embed.weight']})" in ran.texts()
    assert (row["target"], row["prunable"], row["sparsity"]) == (0.5, 64 * 6, 0.5)


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_weight_may_be_named_by_each_of_its_names(name: str, tmp_path: Path) -> None:
    also = model_of(tmp_path / "a", "Tied", also_prune=[name])
    assert load_model(also, "cpu").counts()["prunable"] == 64 * 6 + 10 * 6
    kept = model_of(tmp_path / "k", "Tied", also_prune=["*.weight"], keep=[name])
    assert load_model(kept, "cpu").counts()["prunable"] == 64 * 6


def test_a_network_without_a_prunable_weight_is_an_error_that_says_what_to_name(
    tmp_path: Path,
) -> None:
    model = model_of(tmp_path / "m", "Tied", keep=["mix.weight"])
    said = r"embed\.weight \(.*mix\.weight \(kept.*also_prune.*keep"
    with pytest.raises(StageError, match=said):
        pruned(tmp_path / "a", model, sparsity=0.5)
    steps = {**MAGNITUDE, "sparsity": 0.5, "steps": 2, "refine": "none"}
    del steps["certificate_samples"]
    with pytest.raises(StageError, match=said):
        run_stage("prune_multistep", tmp_path / "b", steps, {"model": model})
    assert facts_of(pruned(tmp_path / "c", model, sparsity=0.0))["sparsity"] == 0


def ruined(folder: Path, dense: Ran) -> Path:
    """The tiny network, its first convolution made so small that it goes first."""
    model = load_model(dense.output(), "cpu")
    with torch.no_grad():
        model.network.get_parameter("conv1.weight").mul_(1e-6)
    folder.mkdir()
    save_model(folder, model)
    return folder


def test_an_emptied_layer_is_a_warning_in_log_model_row_and_record(
    dense: Ran, tmp_path: Path
) -> None:
    ran = pruned(tmp_path, ruined(tmp_path / "m", dense), sparsity=0.5)
    facts = facts_of(ran)
    assert facts["emptied"] == ["conv1"]
    assert "every weight: conv1;" in facts["warnings"][0]
    assert facts["warnings"][0] in ran.texts()
    row, evaluated = row_of(tmp_path / "e", ran.output())
    assert row["emptied"] == ["conv1"]
    assert row["warnings"][0] == facts["warnings"][0]
    assert evaluated.records()[0]["params"]["emptied"] == "conv1"
    assert facts["warnings"][0] in evaluated.texts()
    tuned = run_stage("finetune", tmp_path / "t", {"epochs": 0}, {"model": ran.output()})
    assert facts_of(tuned)["warnings"] == facts["warnings"][:1]  # its accuracy is its own


def test_min_kept_keeps_a_fraction_of_each_layer(dense: Ran, tmp_path: Path) -> None:
    model = ruined(tmp_path / "m", dense)
    ran = pruned(tmp_path, model, sparsity=0.5, min_kept=0.25)
    after = load_model(ran.output(), "cpu")
    for name, mask in after.masks.items():
        assert mask.float().mean() >= 0.25, name
    assert facts_of(ran)["emptied"] == []
    whole = after.counts()["prunable"]
    assert facts_of(ran)["nonzero"] == whole - int(0.5 * whole + 0.5)
    budget = pruned(tmp_path / "b", model, within=100.0, min_kept=0.25)
    assert facts_of(budget)["target"] == pytest.approx(0.75, abs=0.01)


def test_less_than_half_of_the_dense_accuracy_is_a_warning(dense: Ran, tmp_path: Path) -> None:
    said = "is less than half of the dense network's"
    ran = pruned(tmp_path / "a", dense.output(), sparsity=0.99)
    assert said in ran.texts()
    assert said in facts_of(ran)["warnings"][-1]
    row, evaluated = row_of(tmp_path / "e", ran.output())
    assert said in row["warnings"][-1]
    assert f"{row['accuracy']:.2f} %" in row["warnings"][-1]
    assert said in evaluated.texts()
    fine = pruned(tmp_path / "b", dense.output(), sparsity=0.1)
    assert said not in fine.texts()
    assert facts_of(fine)["warnings"] == row_of(tmp_path / "f", fine.output())[0]["warnings"] == []


def test_a_refinement_of_which_nothing_is_kept_is_on_the_row(dense: Ran, tmp_path: Path) -> None:
    params = {
        **{"method": "magnitude", "samples": 60, "stops": [0.3], "sparsity": 0.5},
        "refinement": {"samples": 200, "steps": 8, "lr": 1.0, "held_out": 0.3, "batch_size": 50},
    }
    ran = run_stage("prune_multistep", tmp_path / "r", params, {"model": dense.output()})
    warnings = facts_of(ran)["warnings"]
    assert [text.partition(":")[0] for text in warnings[:2]] == ["Step 1", "Step 2"]
    assert all("Nothing of the refinement is kept" in text for text in warnings[:2])
    picked = run_stage("pick", tmp_path / "p", {"sparsity": 0.3}, {"steps": ran.output("steps")})
    assert facts_of(picked)["warnings"][:1] == warnings[:1]
    assert row_of(tmp_path / "e", ran.output())[0]["warnings"][:2] == warnings[:2]


def test_the_lineage_has_every_parameter_on_the_way(dense: Ran, tmp_path: Path) -> None:
    ran = pruned(tmp_path, dense.output(), sparsity=0.5, selection="greedy")
    tuned = run_stage(
        "finetune",
        tmp_path / "t",
        {"epochs": 0, "lr": 0.3},
        {"model": ran.output(), "teacher": dense.output()},
    )
    row, evaluated = row_of(tmp_path / "e", tuned.output())
    found = row["settings"]
    assert found["path"] == "pretrain > curvature > prune_oneshot > finetune"
    wanted = {
        "pretrain.model_args.width": TINY["model_args"]["width"],  # type: ignore[index]
        "curvature.labels": "matched",
        "prune_oneshot.selection": "greedy",
        "prune_oneshot.min_kept": 0.0,
        "finetune.lr": 0.3,
        "finetune.teacher": "pretrain",
    }
    assert {name: found[name] for name in wanted} == wanted
    seeds = {f"{stage}.seed": 0 for stage in found["path"].split(" > ")}
    assert row["seeds"] == seeds
    assert not set(seeds) & set(found)
    assert "curvature.certificate_samples" not in found  # changes no model
    assert "prune_oneshot.sparsity" not in found  # the target
    assert evaluated.records()[0]["params"]["curvature.labels"] == "matched"
    again = pruned(tmp_path / "again", ran.output(), sparsity=0.8)
    twice = settings(load_model(again.output(), "cpu").facts.lineage)
    assert twice["prune_oneshot.sparsity"] == 0.5
    assert twice["prune_oneshot-2.selection"] == "single"


def test_a_choice_says_what_it_was_among(dense: Ran, tmp_path: Path) -> None:
    folders = [
        pruned(tmp_path / norms, dense.output(), sparsity=0.5, norms=norms).output()
        for norms in ("kept", "reestimated")
    ]
    candidates = [artifact(one, cell=f"oneshot[{one.parts[-4]}]") for one in folders]
    ran = run_stage("select", tmp_path / "s", {}, {"candidates": candidates})
    found = settings(load_model(ran.output(), "cpu").facts.lineage)
    assert found["prune_oneshot.norms"] == "best of kept, reestimated"


def test_models_of_before_there_were_targets_are_read(dense: Ran, tmp_path: Path) -> None:
    ran = pruned(tmp_path, dense.output(), sparsity=0.777)
    path = ran.output() / "model.json"
    facts = json.loads(path.read_text())
    for name in ("target", "lineage", "unprunable", "emptied", "warnings"):
        del facts[name]
    path.write_text(json.dumps({**facts, "sparsity": 0.777}))
    row, _ = row_of(tmp_path / "e", ran.output())
    removed = row["prunable"] - row["nonzero"]
    assert (row["target"], row["sparsity"]) == (0.777, removed / row["prunable"])
    assert row["settings"]["unknown.damping"] == 1e-4


def test_inspect_shows_what_may_be_pruned_of_each_network_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything has run, without data, and with the reasons that the models will have."""
    monkeypatch.setenv("FISHLEG_DATA", str(tmp_path / "none"))
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        "name: x\nplugins: [stages]\nstages:\n"
        "  dense:\n    uses: pretrain\n    matrix: {seed: [0, 1]}\n"
        "    params: {dataset: digits, model: test_nothing_on_less:Tied}\n"
        "  other:\n    uses: pretrain\n"
        "    params: {dataset: cifar10, model: resnet20, keep: ['*.downsample.0.weight']}\n"
    )
    tied, resnet = inspect(load_spec(path), None)
    assert tied["cells"] == ["dense[seed=0]", "dense[seed=1]"]
    assert [(row["weight"], row["prunable"][:3]) for row in tied["rows"]] == [
        ("embed.weight", "an "),
        ("mix.weight", "yes"),
    ]
    assert tied["totals"]["fraction"] == 64 * 6 / (64 * 6 + 10 * 6 + 6)
    assert resnet["totals"]["prunable"] == 268_336
    assert {row["prunable"] for row in resnet["rows"]} == {"yes", "kept dense on request"}
    assert inspect(load_spec(path), "other") == [resnet]
    printed = CliRunner().invoke(app, ["inspect", str(path), "other", "--json"])
    assert json.loads(printed.output) == [resnet]


def test_plan_shows_what_is_not_prunable_of_models_in_the_store(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(
        "name: x\nplugins: [stages]\nstages:\n"
        "  dense:\n    uses: pretrain\n"
        "    params: {dataset: digits, model: test_nothing_on_less:Tied, epochs: 0}\n"
        "  tuned:\n    uses: finetune\n    inputs: {model: dense}\n    params: {epochs: 0}\n"
    )
    here = Path(__file__).parent
    found = os.pathsep.join([str(here), str(here.parents[1])])
    said = []
    for words in ("run --executor local --tracking jsonl", "plan"):
        ran = subprocess.run(
            [sys.executable, "-m", "pipeline", *words.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": found},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(ran.stdout)
    lines = [line for line in said[1].splitlines() if "not prunable" in line]
    assert lines == ["dense: not prunable: embed.weight: an embedding; prunable when named"]
