"""The optimiser's benchmark: equal effort for all, cells that resume, a report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import optimiser
from fishleg.likelihoods import Bernoulli


def tiny(params: dict[str, Any]) -> optimiser.Problem:
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, :3] > 0).float()

    def build() -> nn.Module:
        torch.manual_seed(params["seed"])
        return nn.Linear(5, 3)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield inputs, targets

    return optimiser.Problem(
        build=build, likelihood=Bernoulli(), batches=batches, validation=(inputs, targets)
    )


def test_all_methods_are_tuned_with_the_same_effort() -> None:
    cells = optimiser.cells()
    assert len(cells) == 6
    assert {len(params["grid"]) for params in cells.values()} == {6}
    for problem in ("autoencoder", "resnet20"):
        found = [params for name, params in cells.items() if name.startswith(problem)]
        assert len({(p["trial_steps"], p["steps"], p["batch_size"]) for p in found}) == 1


def test_cells_resume_and_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimiser, "_PROBLEMS", {"autoencoder": tiny, "resnet20": tiny})
    results = {}
    for name, params in optimiser.cells().items():
        params = {**params, "grid": params["grid"][:2], "trial_steps": 12, "steps": 24}
        results[name] = optimiser.run_cell(params, tmp_path / name)
        (tmp_path / name / "final.json").unlink()
        again = optimiser.run_cell(params, tmp_path / name)
        assert again["trials"] == results[name]["trials"]
        assert again["train"] == results[name]["train"]
        assert len(again["train"]) == 24
        best = min(again["trials"], key=lambda trial: trial["validation"])
        assert again["settings"] == best["settings"]
    text = optimiser.report(
        {name: {"result": result} for name, result in results.items()}, tmp_path / "figures"
    )
    assert text.count("| FishLeg |") == 2
    assert (tmp_path / "figures" / "optimiser.png").stat().st_size > 1000


def test_a_trial_that_diverges_loses_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimiser, "_PROBLEMS", {"autoencoder": tiny})
    params = optimiser.cells()["autoencoder/sgd"]
    params = {**params, "grid": [{"lr": 3e38}, {"lr": 0.1}], "trial_steps": 12, "steps": 12}
    found = optimiser.run_cell(params, tmp_path)
    assert found["settings"] == {"lr": 0.1}
    assert found["trials"][0]["validation"] == 1e9
    kept = json.loads((tmp_path / "trial-0.json").read_text())
    assert kept["train"][-1] == 1e9
    assert len(kept["train"]) < 12
