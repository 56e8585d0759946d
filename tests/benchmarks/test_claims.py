"""The benchmarks of the claims: their smallest cells run, and verdicts follow the numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _digits, _seeds, claim_assimilation, claim_noise, claim_structure
from benchmarks.harness.sweeps import next_value
from fishleg import OBS, FishLeg
from stages.stepwise import StepwisePruning

NETWORK = {"width": 2, "hidden": 4, "epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cell's folder that keeps the trained network."""
    folder = tmp_path_factory.mktemp("cell")
    _digits.load_digits(NETWORK, folder)
    return folder


def run(module: Any, cell: str, folder: Path, **params: Any) -> dict[str, Any]:
    """Run a cell with cut-down parameters, and return its document."""
    params = {**module.cells()[cell], "network": NETWORK, **params}
    result = module.run_cell(params, folder)
    return json.loads(json.dumps({"params": params, "result": result, "peak_bytes": 1}))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out, which take longest."""
    for module in (claim_assimilation, claim_noise, claim_structure):
        monkeypatch.setattr(module, "draw", lambda panels, path, columns: None)


def test_a_figure_has_a_panel_for_each_quantity(tmp_path: Path) -> None:
    numbers = {0.8: [90.0, 91.0], 0.9: [80.0, 84.0]}
    panel = _seeds.Panel(title="a", xlabel="x", ylabel="y", lines={"one": numbers}, ylog=True)
    _seeds.draw([panel, panel, panel], tmp_path / "figures" / "one.png", columns=2)
    assert (tmp_path / "figures" / "one.png").stat().st_size > 10_000


def test_the_network_is_trained_once_and_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    weights = (folder / "dense/outputs/model/model.safetensors").stat()
    kept = _digits.load_digits(NETWORK, folder).model.network.state_dict()
    assert (folder / "dense/outputs/model/model.safetensors").stat() == weights
    again = _digits.load_digits(NETWORK, tmp_path).model.network.state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_the_full_inverse_of_every_group_is_possible() -> None:
    width, hidden = _digits.NETWORK["width"], _digits.NETWORK["hidden"]
    assert hidden * (16 * width + 1) <= 2500


def test_differences_are_clear_beyond_three_standard_errors() -> None:
    low = [10.0, 20.0, 30.0]
    high = [11.0, 22.0, 33.0]  # by 2 on average, standard error 1 / sqrt(3): 3.46 of them
    assert _seeds.order(high, low) == "above"
    assert _seeds.order(low, high) == "below"
    assert _seeds.order([10.5, 21.5, 32.5], low) == "level"  # by 1.5: 2.6 of them
    assert _seeds.tally([(high, low), (high, low), (low, low)]) == {"above": 2, "level": 1}
    assert _seeds.show([1.0, 2.0, 3.0]) == "2.0 ± 1.0"


def test_structure_cell(folder: Path) -> None:
    cut = {"samples": 40, "sparsities": [0.5], "dampings": [1e-2, 1e-3], "seeds": [0, 1]}
    full = run(claim_structure, "structure[full]", folder, **cut)["result"]
    diagonal = run(claim_structure, "structure[diagonal]", folder, **cut)["result"]
    assert full["memory_bytes"] > 10 * diagonal["memory_bytes"]
    (chosen,) = full["sparsities"]
    assert len(chosen["test"]) == len(chosen["validation"]) == 2
    assert {1e-2, 1e-3} <= {*chosen["dampings"]}
    assert next_value(chosen["damping"], chosen["dampings"]) is None
    assert len(full["fit_seconds"]) == 2 * len(chosen["dampings"])


def structure_document(structure: str, accuracy: float, memory: int) -> dict[str, Any]:
    at = [accuracy - 1, accuracy, accuracy + 1]
    points = [
        {"sparsity": sparsity, "damping": 0.01, "validation": at, "test": at}
        for sparsity in (0.8, 0.9)
    ]
    result = {
        "dense": {"validation": 98.0, "test": 97.0},
        "memory_bytes": memory,
        "fit_seconds": [1.0, 1.5, 2.0],
        "sparsities": points,
    }
    return {"params": {"structure": structure}, "result": result, "peak_bytes": 10**8}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ((90.0, 91.0), "claim holds here.**"),
        ((90.0, 70.0), "claim holds here for kronecker only"),
        ((70.0, 70.0), "claim does not hold here"),
    ],
)
def test_structure_report(accuracies: tuple[float, float], verdict: str, tmp_path: Path) -> None:
    documents = {
        "a": structure_document("tensor", accuracies[1], 1_000),
        "b": structure_document("kronecker", accuracies[0], 10_000),
        "c": structure_document("full", 90.0, 1_000_000),
        "d": structure_document("diagonal", 50.0, 100),
    }
    text = claim_structure.report(documents, tmp_path)
    assert verdict in text
    assert "| kronecker | " in text
    assert "with 1 % of the memory" in text


def test_noise_cell(folder: Path) -> None:
    cut = {"samples": [20, 200], "dampings": [1e-2], "seeds": [0, 1]}
    ways = run(claim_noise, "noise[kronecker]", folder, **cut)["result"]
    for points in ways.values():
        assert [at["samples"] for at in points] == [20, 200]
        assert all(len(at["test"]) == 2 for at in points)
    few, many = ways["inverted"]
    assert min(few["residual"]) > max(many["residual"]) > 0


@pytest.mark.parametrize("arm", ["probe,identity", "log_det,kfac"])
def test_an_arm_of_fls_learns_on_fresh_batches(arm: str, folder: Path) -> None:
    cut = {"samples": [40], "dampings": [1e-2], "seeds": [0, 1]}
    cell = f"noise[kronecker,fls,{arm}]"
    options = claim_noise.cells()[cell]["fls"]
    found = [
        run(claim_noise, cell, folder, **cut, fls={**options, "steps": steps})["result"]
        for steps in (1, 4)
    ]
    (name,) = found[0]
    assert name.startswith("fls, ")
    (short,), (long,) = (one[name] for one in found)
    assert len(short["test"]) == len(short["error"]) == 2
    assert short["error"] != long["error"]


def test_both_ways_have_one_structure(folder: Path) -> None:
    digits = _digits.load_digits(NETWORK, folder)
    source = digits.gradients(digits.model, samples=30, labels="sampled", seed=0)
    for structure, ways in claim_noise._WAYS.items():
        found = []
        for way in ways.values():
            estimator = way.build(digits.partition, 1e-2)
            if isinstance(estimator, FishLeg) and estimator.options.solver == "adam":
                continue  # slow, and the structure is what it is called
            estimator.fit(source)
            found.append({name: type(block) for name, block in estimator.blocks().items()})
        assert all(one == found[0] for one in found), structure


def test_the_inverse_of_the_exact_fisher_has_no_error(folder: Path) -> None:
    digits = _digits.load_digits(NETWORK, folder)
    truth = claim_noise._exact_fisher(digits, 1e-2)
    estimator = OBS(digits.partition, damping=1e-2, block_size=10_000)
    count = len(digits.dataset.train)
    source = digits.gradients(digits.model, samples=count, labels="enumerated", seed=3)
    estimator.fit(source)
    error, residual = claim_noise._errors(estimator, truth)
    assert error < 1e-5
    assert residual < 1e-4


def noise_document(structure: str, learned: float, inverted: float) -> dict[str, Any]:
    def points(accuracy: float) -> list[dict[str, Any]]:
        near = [(100 - accuracy + change) / 100 for change in (-1, 0, 1)]
        at = [accuracy - 1, accuracy, accuracy + 1]
        chosen = {"damping": 0.01, "error": near, "residual": near, "validation": at, "test": at}
        return [{"samples": samples, **chosen} for samples in (64, 128)]

    return {
        "params": {
            "structure": structure,
            "samples": [64, 128],
            "damping": 1e-3,
            "sparsity": 0.9,
        },
        "result": {"inverted": points(inverted), "learned": points(learned)},
    }


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("learned", "verdict"),
    [
        ((80.0, 80.0), "claim holds here.**"),
        ((80.0, 70.0), "claim holds here for kronecker, learned only"),
        ((60.0, 60.0), "claim does not hold here"),
    ],
)
def test_noise_report(learned: tuple[float, float], verdict: str, tmp_path: Path) -> None:
    documents = {
        "a": noise_document("diagonal", learned[1], 70.0),
        "b": noise_document("kronecker", learned[0], 70.0),
    }
    assert verdict in claim_noise.report(documents, tmp_path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("all_labels", "verdict"),
    [(75.0, "holds here for kronecker, fls, L from K-FAC only"), (85.0, "does not hold here")],
)
def test_an_arm_of_fls_has_to_beat_the_inverse_of_all_labels(
    all_labels: float, verdict: str, tmp_path: Path
) -> None:
    plain = noise_document("kronecker", 60.0, 70.0)
    points = noise_document("kronecker", 80.0, all_labels)["result"]
    plain["result"]["inverted, all labels"] = points["inverted"]
    arm = {
        "params": {**plain["params"], "fls": {"steps": 200}},
        "result": {"fls, L from K-FAC": points["learned"]},
    }
    text = claim_noise.report({"a": arm, "b": plain}, tmp_path)
    assert f"The claim {verdict}" in text
    assert "up to 200 steps" in text


def test_assimilation_cells(folder: Path) -> None:
    cut = {"steps": 2, "epochs": 0, "sparsity": 0.5, "dampings": [1e-2], "seeds": [0, 1]}
    found_by_way = [
        run(claim_assimilation, f"{way}[samples=64,sweeps=1]", folder, **cut)["result"]
        for way in ("refine", "fresh", "reestimate")
    ]
    for found in found_by_way:
        assert len(found["test"]) == len(found["curvature_seconds"]) == 2
        assert min(found["curvature_seconds"]) > 0


def test_a_fresh_start_fits_the_survivors_as_a_refinement_does(folder: Path) -> None:
    """The same masks, samples and sweeps; only the start differs, and so does Q."""
    digits = _digits.load_digits(NETWORK, folder)
    fitted = {}
    for way in ("refine", "fresh"):
        params = claim_assimilation.cells()[f"{way}[samples=64,sweeps=1]"]
        recipe = claim_assimilation._recipe({**params, "steps": 2, "sparsity": 0.5}, 1e-2, seed=0)
        pruning = StepwisePruning(digits.context(recipe, folder))
        pruning.update_curvature(0)
        pruning.prune(0)
        claim_assimilation._update(pruning, way, step=1)
        fitted[way] = pruning.estimator
    refined, fresh = fitted["refine"], fitted["fresh"]
    assert refined.masks is not None
    assert fresh.masks is not None
    assert all(torch.equal(mask, fresh.masks[name]) for name, mask in refined.masks.items())
    pairs = [
        (block.dense(), fresh.blocks()[name].dense()) for name, block in refined.blocks().items()
    ]
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_all_ways_have_the_same_budgets() -> None:
    cells = claim_assimilation.cells().values()
    budgets = [
        {(one["samples"], one["sweeps"]) for one in cells if one["way"] == way}
        for way in claim_assimilation._WAYS
    ]
    assert budgets[0] == budgets[1] == budgets[2]
    assert len(budgets[0]) == len(cells) / 3


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("refined", "verdicts"),
    [
        (80.0, ("holds here.**", "holds here.**")),
        (60.0, ("does not hold here", "holds here.**")),
        (40.0, ("does not hold here", "does not hold here")),
    ],
)
def test_assimilation_report(refined: float, verdicts: tuple[str, str], tmp_path: Path) -> None:
    documents = {}
    for way, accuracy in (("refine", refined), ("fresh", 70.0), ("reestimate", 50.0)):
        at = [accuracy - 1, accuracy, accuracy + 1]
        result = {
            "damping": 0.01,
            "test": at,
            "validation": at,
            "curvature_seconds": [1.0, 2.0, 3.0],
        }
        for samples in (64, 128):
            params = {"way": way, "samples": samples, "sweeps": 1}
            params |= {"sparsity": 0.95, "steps": 6, "epochs": 1}
            documents[f"{way} {samples}"] = {"params": params, "result": result}
    text = claim_assimilation.report(documents, tmp_path)
    assert f"Against fresh start, survivors, the claim {verdicts[0]}" in text
    assert f"Against full Fisher, zeros constrained, the claim {verdicts[1]}" in text
    assert f"{refined - 70:+.1f} points of accuracy on average, in 1.00 times" in text
