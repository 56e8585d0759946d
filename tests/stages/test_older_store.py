"""A store of an earlier version: its estimates and models are read.

The store in fixtures/ was made before the runner had folders and the library options: a small
network on the digits, four methods' estimates, and the models pruned by them. Its file has the
method eigen as method fishleg in structure eigen.
"""

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running_stages import artifact, run_stage
from toy_runs import ROOT

from stages.estimate import load_estimate
from stages.model_folder import load_model

STORE = Path(__file__).parent / "fixtures" / "older_store.tar.xz"
METHODS = {"fishleg": "eigen", "obs": "obs", "kfac": "kfac", "magnitude": "magnitude"}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with tarfile.open(STORE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def fls(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def rename(folder: Path) -> None:
    """Write the present name of the method into the pipeline file, as its error tells."""
    file = folder / "pipeline.yaml"
    text = file.read_text().replace("fishleg: {structure: eigen, warm_start: kfac}", "eigen: {}")
    file.write_text(text.replace("[fishleg,", "[eigen,"))


def outputs(folder: Path, name: str) -> dict[str, Path]:
    """Return method -> the folder of output `name`, or "dense" for the dense network."""
    found = {}
    for file in folder.glob(f".fls/stages/*/attempts/0001/outputs/{name}/{name}.json"):
        facts = json.loads(file.read_text())
        method = facts["recipe"]["method"]["name"] if "recipe" in facts else facts["method"]
        found[method] = file.parent
    return found


def test_an_older_file_is_told_the_present_name_at_its_place(older: Path) -> None:
    said = fls(older, "plan", code=2)
    assert "pipeline.yaml:16:28: fishleg.structure:" in said
    assert "'eigen' is now a method of its own: write `method: eigen`" in said


def test_an_older_store_is_intact_and_its_file_plans_with_the_present_name(older: Path) -> None:
    rename(older)
    assert fls(older, "verify").endswith("no damage.\n")
    (run,) = json.loads(fls(older, "status", "--json"))
    assert (run["state"], run["counts"]) == ("done", {"done": 10})
    assert "10 of 10 cells to run." in fls(older, "plan")


@pytest.mark.parametrize("method", METHODS)
def test_an_older_estimate_prunes_as_it_did(older: Path, method: str) -> None:
    dense, estimate = outputs(older, "model")["dense"], outputs(older, "curvature")[method]
    known = load_model(dense, "cpu")
    made = load_estimate(estimate, known.facts.partition(known.network), "cpu")
    assert (made.estimator.name, made.recipe.method.name) == (METHODS[method], METHODS[method])
    model = replace(artifact(dense), key=made.model_key)
    inputs = {"model": [model], "curvature": [artifact(estimate)]}
    params = {"sparsity": 0.8, "distribution": "global", "certificate_samples": 0}
    pruned = load_model(run_stage("prune_oneshot", older / "again", params, inputs).output(), "cpu")
    before = load_model(outputs(older, "model")[method], "cpu")
    assert pruned.masks.keys() == before.masks.keys()
    for name, mask in before.masks.items():
        assert torch.equal(pruned.masks[name], mask)
