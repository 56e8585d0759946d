"""The whole of it on the digits, small: the real command, real stages, a kill in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stages.columns import COLUMNS

ROOT = Path(__file__).resolve().parent.parent
RUN = ("run", "--executor", "local", "--tracking", "jsonl")
SPEC = """
name: small
plugins: [stages]
stages:
  pretrain:
    uses: pretrain
    params: {dataset: digits, model: digits_resnet, epochs: 3, batch_size: 64}
    checkpoint_every_s: 0
  curvature:
    uses: curvature
    matrix: {method: [eigen, magnitude]}
    inputs: {model: pretrain}
    params: {samples: 200, certificate_samples: 0}
  oneshot:
    uses: prune_oneshot
    matrix: {method: [eigen, magnitude], sparsity: [0.9]}
    inputs: {model: pretrain, curvature: curvature}
    params: {certificate_samples: 0}
  finetune:
    uses: finetune
    matrix: {method: [eigen, magnitude], sparsity: [0.9]}
    inputs: {model: oneshot, teacher: pretrain}
    params: {epochs: 1, batch_size: 64}
  evaluate:
    uses: evaluate
    inputs: {models: [pretrain, oneshot, finetune]}
  compare:
    uses: compare
    inputs: {results: evaluate}
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def fls(folder: Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "pipeline.yaml").write_text(SPEC)
    output = fls(folder, *RUN)
    assert "| eigen |" in output
    assert "figure.png" in output
    return folder


def plan(folder: Path, *arguments: str) -> dict[str, dict[str, str]]:
    return {one["cell"]: one for one in json.loads(fls(folder, "plan", "--json", *arguments))}


def weights(folder: Path, cell: str) -> dict[str, bytes]:
    fls(folder, "export", "pipeline.yaml", cell, "out")
    tensors = load_file(folder / "out" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_a_second_run_executes_nothing(finished: Path) -> None:
    before = sorted((finished / ".fls" / "stages").iterdir())
    assert "| eigen |" in fls(finished, *RUN)
    assert sorted((finished / ".fls" / "stages").iterdir()) == before
    assert {one["state"] for one in plan(finished).values()} == {"cached"}


def test_a_changed_parameter_reruns_what_depends_on_it(finished: Path) -> None:
    found = plan(finished, "--set", "finetune.epochs=2")
    stages = {one["stage"] for one in found.values() if one["state"] == "run"}
    assert stages == {"finetune", "evaluate", "compare"}
    assert "epochs: 1 -> 2" in found["finetune[method=eigen,sparsity=0.9]"]["why"]


def test_results_have_every_model(finished: Path) -> None:
    rows = json.loads(fls(finished, "results", "pipeline.yaml", "--json"))
    assert all(set(row) == {column.name for column in COLUMNS} for row in rows)
    found = {(row["method"], row["finetuned"], row["target"]) for row in rows}
    pruned = {(method, tuned, 0.9) for method in ("eigen", "magnitude") for tuned in (0, 1)}
    assert found == {("dense", False, 0.0), *pruned}
    for row in rows:
        assert row["run_id"] is None
        removed = int(row["target"] * row["prunable"] + 0.5)
        assert row["nonzero"] == row["prunable"] - removed
        assert row["sparsity"] == removed / row["prunable"]


def test_a_kill_in_the_middle_of_training_changes_no_bit(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(SPEC)
    process = start(tmp_path, *RUN, "--until", "pretrain")
    deadline = time.monotonic() + 60
    while (
        len(list(tmp_path.glob(".fls/stages/*/attempts/*/checkpoints/0*[0-9]/.digests.json"))) < 2
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob(".fls/stages/*/manifest.json"))
    assert "1 done" in fls(tmp_path, "resume", "last")
    assert "resuming from epoch" in fls(tmp_path, "logs", "pretrain")
    assert weights(tmp_path, "pretrain") == weights(finished, "pretrain")
