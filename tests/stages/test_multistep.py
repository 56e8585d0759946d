"""Pruning in several steps without labels: counts, kept steps, budgets, interrupted runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from running_stages import STAGES, Ran, artifact, run_stage
from test_curvature_and_pruning import assert_sparsity
from test_training import Stopped, assert_same_model, stop_in

from fishleg.pruning import FRACTIONS
from pipeline.stage import Context, StageError
from stages.model_folder import load_model
from stages.prune_multistep import prune_multistep

STEPWISE = {
    "method": "fishleg",
    "samples": 60,
    "batch_size": 20,
    "damping": 1e-3,
    "fishleg": {"structure": "kronecker", "warm_start": "moments", "sweeps": 1},
    "stops": [0.5, 0.8],
    "sparsity": 0.9,
    "refinement": {"samples": 300, "steps": 25, "batch_size": 50, "lr": 1e-2, "cutmix": 0.2},
}


_NORMS = "refinement/clean_norms_kept"


def multistep(folder: Path, dense: Ran, **params: Any) -> Ran:
    inputs = {"model": dense.output()}
    return run_stage("prune_multistep", folder, {**STEPWISE, **params}, inputs)


@pytest.fixture(scope="module")
def refined(dense: Ran, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return multistep(tmp_path_factory.mktemp("refined"), dense)


def test_every_step_has_its_exact_count_and_is_kept(refined: Ran, tmp_path: Path) -> None:
    steps = json.loads((refined.output("steps") / "steps.json").read_text())["steps"]
    assert [step["target"] for step in steps] == [0.5, 0.8, 0.9]
    for number, step in enumerate(steps, start=1):
        model = load_model(refined.output("steps") / f"{number:03d}", "cpu")
        assert_sparsity(model, step["target"])
        assert step["sparsity"] == model.findings()["sparsity"]
        assert (model.facts.mode, model.facts.method) == ("refined", "fishleg")
    assert_same_model(refined.output("steps") / "003", refined.output())


def test_refinement_lowers_the_divergence(refined: Ran, dense: Ran, tmp_path: Path) -> None:
    plain = multistep(tmp_path, dense, refine="none")
    assert load_model(plain.output(), "cpu").facts.mode == "multistep"
    assert_sparsity(load_model(plain.output(), "cpu"), 0.9)
    gained = refined.metrics()["validation/nll"] / plain.metrics()["validation/nll"]
    assert gained < 0.8


def test_each_step_has_its_own_number_of_refinement_steps(dense: Ran, tmp_path: Path) -> None:
    refinement = {**STEPWISE["refinement"], "steps": [0, 20, 5]}
    ran = multistep(tmp_path, dense, refinement=refinement)
    found = [event for event in ran.events if event["type"] == "metrics"]
    looks = [event["step"] for event in found if "refinement/divergence" in event["values"]]
    assert looks == [20, 25]
    settled = [event["step"] for event in found if "refinement/kept" in event["values"]]
    assert settled == [2, 3]
    with pytest.raises(ValidationError, match="a number for each of 3 pruning steps, got 2"):
        refinement["steps"] = [5, 5]
        STAGES["prune_multistep"].params.model_validate({**STEPWISE, "refinement": refinement})


def test_a_refinement_that_does_harm_is_taken_back(dense: Ran, tmp_path: Path) -> None:
    """At a rate that ruins the network, what was there before is kept, and the zeros with it."""
    harmful = {**STEPWISE["refinement"], "lr": 1.0, "held_out": 0.2}
    ran = multistep(tmp_path / "a", dense, refinement=harmful, stops=[0.5], sparsity=0.6)
    plain = multistep(tmp_path / "b", dense, refine="none", stops=[0.5], sparsity=0.6)
    kept = [
        event["values"]["refinement/kept"]
        for event in ran.events
        if event["type"] == "metrics" and "refinement/kept" in event["values"]
    ]
    assert kept == [0.0, 0.0]
    assert_same_model(ran.output(), plain.output())


def test_held_out_samples_choose_the_norms_after_each_refinement(refined: Ran) -> None:
    values = [event["values"] for event in refined.events if event["type"] == "metrics"]
    chosen = [one[_NORMS] for one in values if _NORMS in one]
    assert len(chosen) == sum(one.get("refinement/kept", 0) > 0 for one in values) > 0
    assert set(chosen) <= set(FRACTIONS)


@pytest.mark.parametrize("refine", ["natural", "gauss_newton"])
def test_every_refinement_runs(refine: str, dense: Ran, tmp_path: Path) -> None:
    options = {"samples": 100, "steps": 2, "batch_size": 50, "cg_iterations": 2}
    ran = multistep(tmp_path, dense, refine=refine, refinement=options)
    assert_sparsity(load_model(ran.output(), "cpu"), 0.9)


@pytest.mark.parametrize(
    ("step", "fitting", "times"), [(0, True, 2), (0, False, 1), (1, False, 2), (2, True, 3)]
)
def test_a_run_that_was_killed_reaches_the_same_bits(
    step: int, fitting: bool, times: int, dense: Ran, tmp_path: Path
) -> None:
    """Not fitting, three checkpoints stand in a step's refinement, and one before the next fit."""
    inputs = {"model": dense.output()}
    whole = multistep(tmp_path / "whole", dense)
    ctx = Context(
        params=STAGES["prune_multistep"].params.model_validate(STEPWISE),
        folder=tmp_path / "killed",
        inputs={"model": [artifact(dense.output())]},
        emit=stop_in(tmp_path / "killed", step, fitting=fitting, times=times),
        checkpoint_every_s=0,
    )
    with pytest.raises(Stopped):
        prune_multistep(ctx)
    again = run_stage("prune_multistep", tmp_path / "killed", STEPWISE, inputs)
    assert_same_model(whole.output(), again.output())
    assert_same_model(whole.output("steps") / "001", again.output("steps") / "001")
    notes = [one.output("steps") / "steps.json" for one in (whole, again)]
    assert notes[0].read_bytes() == notes[1].read_bytes()


def test_pick_takes_a_sparsity(refined: Ran, tmp_path: Path) -> None:
    ran = run_stage("pick", tmp_path, {"sparsity": 0.8}, {"steps": refined.output("steps")})
    assert_sparsity(load_model(ran.output(), "cpu"), 0.8)
    with pytest.raises(StageError, match=r"no step has sparsity 0.7; the steps have 0.5, 0.8"):
        run_stage("pick", tmp_path / "no", {"sparsity": 0.7}, {"steps": refined.output("steps")})


def test_pick_takes_the_sparsest_step_within_a_budget(refined: Ran, tmp_path: Path) -> None:
    facts = json.loads((refined.output("steps") / "steps.json").read_text())
    dense = facts["dense"]["validation_accuracy"]
    lost = [dense - step["validation_accuracy"] for step in facts["steps"]]
    assert lost[0] < lost[2], "the tiny network loses accuracy on the way"
    inputs = {"steps": refined.output("steps")}
    ran = run_stage("pick", tmp_path / "a", {"within": max(lost[0], 0.0)}, inputs)
    target = load_model(ran.output(), "cpu").facts.target
    assert target == max(
        step["target"]
        for step, points in zip(facts["steps"], lost, strict=True)
        if points <= max(lost[0], 0.0)
    )
    ran = run_stage("pick", tmp_path / "b", {"within": 100.0}, inputs)
    assert load_model(ran.output(), "cpu").facts.target == 0.9


@pytest.mark.parametrize("stage", ["pick", "prune_oneshot"])
@pytest.mark.parametrize("params", [{}, {"sparsity": 0.5, "within": 1.0}])
def test_a_target_is_a_sparsity_or_a_budget(stage: str, params: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="either `sparsity` or `within`"):
        STAGES[stage].params.model_validate(params)


def test_stops_rise() -> None:
    with pytest.raises(ValidationError, match="expected to rise"):
        STAGES["prune_multistep"].params.model_validate({**STEPWISE, "stops": [0.8, 0.5]})
