"""The optimiser's benchmark: equal effort for all, cells that resume, a report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import _problems, optimiser
from fishleg.likelihoods import Bernoulli


def tiny(batch_size: int, seed: int) -> _problems.Problem:
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, :3] > 0).float()

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(5, 3)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield inputs, targets

    return _problems.Problem(
        build=build, likelihood=Bernoulli(), batches=batches, validation=(inputs, targets)
    )


def test_all_methods_are_tuned_with_the_same_effort() -> None:
    cells = optimiser.cells()
    assert len(cells) == 13
    for problem in ("autoencoder", "digits", "resnet20"):
        found = [params for name, params in cells.items() if name.startswith(problem)]
        assert len({(p["trial_steps"], p["steps"], p["batch_size"]) for p in found}) == 1
        assert len({len(params["grid"]) for params in found}) == 1
        assert all(params["seeds"] == found[0]["seeds"] for params in found)


def documents(tmp_path: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Run all cells on tiny problems, and return their documents."""
    found = {}
    for name, params in optimiser.cells().items():
        params = {**params, "grid": params["grid"][:2], "trial_steps": 12, "steps": steps}
        result = optimiser.run_cell(params, tmp_path / name)
        found[name] = json.loads(json.dumps({"params": params, "result": result}))
    return found


@pytest.fixture
def tiny_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _problems.PROBLEMS:
        monkeypatch.setitem(_problems.PROBLEMS, name, tiny)


@pytest.mark.usefixtures("tiny_problems")
def test_cells_resume_and_are_reported(tmp_path: Path) -> None:
    found = documents(tmp_path, steps=24)
    for name, document in found.items():
        params, before = document["params"], document["result"]
        (tmp_path / name / "final-0.json").unlink()
        again = optimiser.run_cell(params, tmp_path / name)
        assert again["trials"] == before["trials"]
        assert len(again["runs"]) == len(params["seeds"])
        trained = [run["train"] for run in again["runs"]]
        assert trained == [run["train"] for run in before["runs"]]
        assert {len(one) for one in trained} == {24}
        best = min(again["trials"], key=lambda trial: trial["validation"])
        assert again["settings"] == best["settings"]
    text = optimiser.report(found, tmp_path / "figures")
    assert text.count("| FishLeg |") == 3
    assert text.count("| K-FAC |") == 2
    assert (tmp_path / "figures" / "optimiser.png").stat().st_size > 1000


@pytest.mark.usefixtures("tiny_problems")
def test_the_rows_without_learning_differ_from_fishleg_and_from_each_other(tmp_path: Path) -> None:
    """From the second update on, where a learned correction has moved."""
    found = documents(tmp_path, steps=12)
    trained = {
        name: found[f"digits/{name}"]["result"]["runs"][0]["train"]
        for name in ("fishleg", "frozen", "kfac")
    }
    assert trained["fishleg"] != trained["frozen"]
    assert trained["frozen"] != trained["kfac"]


@pytest.mark.parametrize(
    ("losses", "words"),
    [([1.0, 2.0, 3.0], "lower than"), ([2.0, 3.0, 4.0], "not clearly unlike")],
)
def test_learning_is_judged_seed_by_seed(losses: list[float], words: str) -> None:
    others = [2.0, 3.1, 4.0]
    pairs = {"fishleg": losses, "frozen": others}
    text = optimiser.verdict(
        {
            method: {
                "params": {"problem": "digits", "method": method},
                "result": {"runs": [{"validation": [[1, 1.0, loss]]} for loss in numbers]},
            }
            for method, numbers in pairs.items()
        }
    )
    assert f"is {words} 3.0333 ± 1.0017 (n = 3)" in text


@pytest.mark.usefixtures("tiny_problems")
def test_a_trial_that_diverges_loses_and_is_kept(tmp_path: Path) -> None:
    params = optimiser.cells()["autoencoder/sgd"]
    params = {**params, "grid": [{"lr": 3e38}, {"lr": 0.1}], "trial_steps": 12, "steps": 12}
    found = optimiser.run_cell(params, tmp_path)
    assert found["settings"] == {"lr": 0.1}
    assert found["trials"][0]["validation"] == 1e9
    kept = json.loads((tmp_path / "trial-0.json").read_text())
    assert kept["train"][-1] == 1e9
    assert len(kept["train"]) < 12
