"""The benchmark of ResNet18, on a few images: in two pieces, by the command that it names."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness.documents import read_cells
from benchmarks.harness.pipelines import keep_results
from benchmarks.harness.report import write_report
from benchmarks.harness.suite import BENCHMARKS
from pipeline.spec.load import load_spec

SMALL = {
    "gpus": "0",
    "width": "8",
    "verify": "false",
    "epochs": "2",
    "methods": "[fishleg, magnitude]",
    "sparsities": "[0.9]",
    "stops": "[0.9]",
    "samples": "8",
    "steps": "2",
    "epochs_per_step": "1",
    "refinement": "{samples: 16, steps: 2, batch_size: 8}",
    "fishleg": "{structure: tensor_scaled, warm_start: moments, steps: 2, refine_steps: 1}",
}
SETTINGS = [f"vars.{name}={value}" for name, value in SMALL.items()]


def write_images(folder: Path) -> None:
    """Write a CIFAR-10 of eight images a file."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        images = generator.integers(0, 256, (8, 1 + 3072), dtype=np.uint8)
        images[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(images.tobytes())


def test_it_runs_in_pieces_and_every_model_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHLEG_DATA", str(tmp_path))
    monkeypatch.setenv("FISHLEG_BENCHMARKS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    write_images(tmp_path / "cifar-10-batches-bin")
    path = BENCHMARKS / "resnet18.yaml"
    command = [sys.executable, "-m", "pipeline", "run", str(path)]
    command += ["--executor", "local", "--tracking", "jsonl", "--max-parallel", "1"]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    pieces = [
        subprocess.run([*command, "--stop-after", limit], capture_output=True, text=True)
        for limit in ("4s", "5m")
    ]
    assert [one.returncode for one in pieces] == [143, 0], [one.stdout for one in pieces]
    assert "resumes it" in pieces[0].stdout

    keep_results(load_spec(path, SETTINGS), "resnet18", tmp_path / "results")
    documents = read_cells(tmp_path / "results", "resnet18")
    found = {(one["method"], one["mode"]) for one in documents.values()}
    kinds = ("oneshot", "refined", "gradual")
    methods = ("fishleg", "magnitude")
    assert found == {("dense", "dense")} | {(name, kind) for name in methods for kind in kinds}
    assert all(one["cpu_seconds"] > 0 for one in documents.values() if one["mode"] != "dense")
    environments = [json.loads(file.read_text()) for file in tmp_path.glob("results/env*/*.json")]
    assert {one["device"] for one in environments} == {"cpu"}
    write_report(tmp_path / "results.md", tmp_path / "results")
    assert "### Gradual" in (tmp_path / "results.md").read_text()
