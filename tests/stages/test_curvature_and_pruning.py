"""From curvature to pruned models: exact counts, facts, interrupted runs, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from running_stages import STAGES, Ran, artifact, run_stage
from test_training import Stopped, assert_same_model, stop_after, stop_in
from torch import nn

from fishleg.options import ObsOptions
from fishleg.parameters import partition_parameters
from fishleg.pruning import removal_count
from pipeline.stage import Context, StageError
from stages.catalogue import (
    METHODS,
    CurvatureParams,
    EigenParams,
    FishLegParams,
    GradualParams,
    ObsParams,
)
from stages.curvature import curvature
from stages.estimate import Recipe
from stages.lineage import settings
from stages.model_folder import Model, load_model
from stages.prune_gradual import prune_gradual

KRONECKER = {"structure": "kronecker", "warm_start": "moments", "sweeps": 2}
QUICK = {
    "samples": 60,
    "batch_size": 20,
    "damping": 1e-3,
    "fishleg": KRONECKER,
    "fls": {"steps": 40, "batch": 16, "check_every": 10},
}


@pytest.fixture(scope="module")
def estimates(dense: Ran, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """The tiny network's curvature by every method."""
    folder = tmp_path_factory.mktemp("curvature")
    return {
        method: run_stage(
            "curvature",
            folder / method,
            {**QUICK, "method": method, "certificate_samples": 20},
            {"model": dense.output()},
        )
        for method in METHODS.entries
    }


def prune(folder: Path, dense: Ran, estimate: Ran, **params: Any) -> Ran:
    inputs = {"model": dense.output(), "curvature": estimate.output("curvature")}
    return run_stage("prune_oneshot", folder, {"certificate_samples": 20, **params}, inputs)


def assert_sparsity(model: Model, sparsity: float) -> None:
    counts = model.counts()
    removed = removal_count(counts["prunable"], sparsity)
    assert counts["nonzero"] == counts["prunable"] - removed
    assert sum(int((~mask).sum()) for mask in model.masks.values()) == removed
    for name, mask in model.masks.items():
        assert torch.equal(model.network.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("method", METHODS.entries)
def test_every_method_prunes_to_the_exact_count(
    method: str, dense: Ran, estimates: dict[str, Ran], tmp_path: Path
) -> None:
    ran = prune(tmp_path, dense, estimates[method], sparsity=0.777)
    model = load_model(ran.output(), "cpu")
    assert_sparsity(model, 0.777)
    facts = model.facts
    assert (facts.method, facts.mode, facts.target) == (method, "oneshot", 0.777)
    assert (facts.damping, facts.finetuned) == (1e-3, False)
    assert (
        json.loads((ran.output() / "model.json").read_text())["nonzero"]
        == model.counts()["nonzero"]
    )
    assert ran.metrics()["pruned/measured_kl"] > 0
    assert ran.metrics()["pruned/predicted_kl"] > 0


@pytest.mark.parametrize("compensation", ["none", "independent", "fisher"])
def test_every_compensation_runs(
    compensation: str, dense: Ran, estimates: dict[str, Ran], tmp_path: Path
) -> None:
    ran = prune(
        tmp_path,
        dense,
        estimates["fishleg"],
        sparsity=0.5,
        compensation=compensation,
        cg_iterations=20,
    )
    assert_sparsity(load_model(ran.output(), "cpu"), 0.5)


@pytest.mark.parametrize(("method", "own"), [("layer", "uniform"), ("obs", "global")])
def test_an_unset_distribution_is_the_methods_own(
    method: str, own: str, dense: Ran, estimates: dict[str, Ran], tmp_path: Path
) -> None:
    """The layer Hessian's costs have another unit in each layer."""
    unset = prune(tmp_path / "unset", dense, estimates[method], sparsity=0.6)
    for distribution in ("global", "uniform"):
        folder = tmp_path / distribution
        chosen = prune(folder, dense, estimates[method], sparsity=0.6, distribution=distribution)
        masks = [load_model(one.output(), "cpu").masks for one in (unset, chosen)]
        same = all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
        assert same is (distribution == own)
        lineages = [load_model(one.output(), "cpu").facts.lineage for one in (unset, chosen)]
        assert (settings(lineages[0]) == settings(lineages[1])) is (distribution == own)
    gradual = {**GRADUAL, "method": method, "steps": 2, "epochs": 0}
    ran = run_stage("prune_gradual", tmp_path / "steps", gradual, {"model": dense.output()})
    assert load_model(ran.output(), "cpu").facts.lineage[-1].params["distribution"] == own


@pytest.mark.parametrize("method", ["layer", "kfac", "fishleg", "obs"])
def test_joint_selections_cost_less_by_the_estimates_own_curvature(
    dense: Ran, estimates: dict[str, Ran], tmp_path: Path, method: str
) -> None:
    ran = {}
    for selection in ("single", "greedy", "admm"):
        given = {"sparsity": 0.6, "selection": selection, "distribution": "uniform"}
        one = ran[selection] = prune(tmp_path / selection, dense, estimates[method], **given)
        assert_sparsity(load_model(one.output(), "cpu"), 0.6)
    costs = {name: one.metrics()["pruned/predicted"] for name, one in ran.items()}
    assert costs["greedy"] < costs["single"]
    assert costs["admm"] < costs["single"]
    found = ran["admm"].metrics()
    assert found["pruned/cost_admm"] < found["pruned/cost_single"]


def test_several_steps_by_admm_have_the_full_fisher_in_each(dense: Ran, tmp_path: Path) -> None:
    given = {
        "sparsity": 0.8,
        "method": "kfac",
        "steps": 2,
        "samples": 40,
        "refine": "none",
        "selection": "admm",
    }
    ran = run_stage("prune_multistep", tmp_path / "ran", given, {"model": dense.output()})
    assert_sparsity(load_model(ran.output(), "cpu"), 0.8)
    with pytest.raises(ValueError, match="got carry: refine.*set carry: reestimate"):
        run_stage("prune_multistep", tmp_path, given | {"carry": "refine"}, {})
    online = {"method": "kfac", "sparsity": 0.8, "curvature": "online", "carry": "reestimate"}
    with pytest.raises(ValueError, match="online expects selection: single or greedy"):
        run_stage("prune_gradual", tmp_path, online | {"selection": "admm"}, {})


@pytest.mark.parametrize("anew", ["reestimated", "augmented"])
def test_norms_measured_anew_mend_a_pruned_network(
    anew: str, estimates: dict[str, Ran], dense: Ran, tmp_path: Path
) -> None:
    given = {"sparsity": 0.8, "compensation": "none"}
    ran = {
        norms: prune(tmp_path / norms, dense, estimates["magnitude"], norms=norms, **given)
        for norms in ("kept", anew)
    }
    kept, measured = (load_model(one.output(), "cpu").network for one in ran.values())
    assert all(
        torch.equal(a, b) for a, b in zip(kept.parameters(), measured.parameters(), strict=True)
    )
    buffers = dict(measured.named_buffers())
    moved = [name for name, one in kept.named_buffers() if not torch.equal(one, buffers[name])]
    assert moved
    assert all(name.rpartition(".")[2] in {"running_mean", "running_var"} for name in moved)
    losses = [one.metrics()["validation/nll"] for one in ran.values()]
    assert losses[1] < losses[0]


def test_norms_of_augmented_samples_are_the_same_in_every_run_and_not_those_of_clean_ones(
    estimates: dict[str, Ran], dense: Ran, tmp_path: Path
) -> None:
    given = {"sparsity": 0.8, "compensation": "none"}
    ran = [
        prune(tmp_path / name, dense, estimates["magnitude"], norms=norms, **given)
        for name, norms in [("a", "augmented"), ("b", "augmented"), ("c", "reestimated")]
    ]
    first, again, clean = (load_model(one.output(), "cpu").network.state_dict() for one in ran)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], clean[name]) for name in first)


def test_an_estimate_is_certified_on_unseen_samples(estimates: dict[str, Ran]) -> None:
    for method, ran in estimates.items():
        facts = json.loads((ran.output("curvature") / "curvature.json").read_text())
        certificate = facts["certificate"]["network"]
        assert certificate["best_scale"] > 0, method
        if method in {"diagonal", "magnitude"}:
            assert certificate["diagonal_objective"] < certificate["objective"]
        assert ran.metrics()["certificate/objective"] == certificate["objective"]
        assert ran.metrics()["memory_bytes"] > 0


def test_kept_weights_are_not_pruned(dense: Ran, tmp_path: Path) -> None:
    facts = json.loads((dense.output() / "model.json").read_text())
    facts["keep"] = ["conv1.weight", "fc*.weight"]
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("model.safetensors", "masks.safetensors"):
        (kept / name).write_bytes((dense.output() / name).read_bytes())
    (kept / "model.json").write_text(json.dumps(facts))
    inputs = {"model": kept}
    estimate = run_stage("curvature", tmp_path / "c", {**QUICK, "method": "magnitude"}, inputs)
    inputs["curvature"] = estimate.output("curvature")
    ran = run_stage("prune_oneshot", tmp_path / "p", {"sparsity": 0.9}, inputs)
    model = load_model(ran.output(), "cpu")
    assert sorted(model.masks) == ["block.conv1.weight", "block.conv2.weight"]
    assert_sparsity(model, 0.9)


def test_parameters_without_curvature_are_named(dense: Ran, tmp_path: Path) -> None:
    """BatchNorm, convolutions and linear layers are all covered: nothing to name."""
    ran = run_stage(
        "curvature", tmp_path, {**QUICK, "method": "diagonal"}, {"model": dense.output()}
    )
    assert "no curvature" not in ran.texts()


@pytest.mark.parametrize(
    "method", ["eigen", "fishleg", "obs", "kfac", "ekfac", "mfac", "layer", "diagonal"]
)
@pytest.mark.parametrize("checkpoints", [2, 4])
def test_a_fit_that_was_killed_reaches_the_same_bits(
    method: str, checkpoints: int, dense: Ran, tmp_path: Path
) -> None:
    params = {**QUICK, "method": method, "certificate_samples": 0}
    inputs = {"model": dense.output()}
    whole = run_stage("curvature", tmp_path / "whole", params, inputs)
    ctx = Context(
        params=CurvatureParams.model_validate(params),
        folder=tmp_path / "killed",
        inputs={"model": [artifact(dense.output())]},
        emit=stop_after(checkpoints),
        checkpoint_every_s=0,
    )
    with pytest.raises(Stopped):
        curvature(ctx)
    again = run_stage("curvature", tmp_path / "killed", params, inputs)
    assert "resuming an unfinished fit" in again.texts()
    if method != "fishleg":  # whose gradients are gathered anew
        assert again.progress()[0] >= whole.progress()[checkpoints - 1]
    for name in ("curvature.safetensors", "curvature.json"):
        paths = [ran.output("curvature") / name for ran in (whole, again)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_curvature_of_another_model_is_refused(
    dense: Ran, estimates: dict[str, Ran], tmp_path: Path
) -> None:
    estimate = artifact(estimates["obs"].output("curvature"), cell="curvature[seed=1]")
    other = artifact(dense.output(), cell="pretrain[seed=0]")
    object.__setattr__(other, "key", "another")
    with pytest.raises(StageError, match=r"curvature\[seed=1\] .* than pretrain\[seed=0\]"):
        run_stage(
            "prune_oneshot",
            tmp_path,
            {"sparsity": 0.5},
            {"model": [other], "curvature": [estimate]},
        )


GRADUAL = {
    **QUICK,
    "sparsity": 0.9,
    "steps": 3,
    "epochs": 1,
    "batch_size": 64,
    "lr": 0.02,
    "warmup_epochs": 0.0,
}


@pytest.mark.parametrize(
    ("method", "carry"), [("fishleg", "refine"), ("obs", "reestimate"), ("magnitude", "refine")]
)
def test_gradual_pruning_reaches_the_exact_count(
    method: str, carry: str, dense: Ran, tmp_path: Path
) -> None:
    ran = run_stage(
        "prune_gradual",
        tmp_path,
        {**GRADUAL, "method": method, "carry": carry},
        {"model": dense.output()},
    )
    model = load_model(ran.output(), "cpu")
    assert_sparsity(model, 0.9)
    assert (model.facts.method, model.facts.mode) == (method, "gradual")
    steps = [
        event["values"]["pruned/sparsity"]
        for event in ran.events
        if event["type"] == "metrics" and "pruned/sparsity" in event["values"]
    ]
    assert steps == sorted(steps)
    assert len(steps) == 3
    assert ran.metrics()["validation/accuracy"] > 30


@pytest.mark.parametrize("carry", ["refine", "reestimate"])
@pytest.mark.parametrize("fitting", [True, False], ids=["in its fit", "in its training"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_gradual_pruning_that_was_killed_reaches_the_same_bits(
    carry: str, step: int, fitting: bool, dense: Ran, tmp_path: Path
) -> None:
    method = "fishleg" if carry == "refine" else "obs"
    params = {**GRADUAL, "method": method, "carry": carry, "steps": 2}
    inputs = {"model": dense.output()}
    whole = run_stage("prune_gradual", tmp_path / "whole", params, inputs)
    ctx = Context(
        params=STAGES["prune_gradual"].params.model_validate(params),
        folder=tmp_path / "killed",
        inputs={"model": [artifact(dense.output())]},
        emit=stop_in(tmp_path / "killed", step, fitting=fitting),
        checkpoint_every_s=0,
    )
    with pytest.raises(Stopped):
        prune_gradual(ctx)
    again = run_stage("prune_gradual", tmp_path / "killed", params, inputs)
    assert_same_model(whole.output(), again.output())
    prunings = [e for e in again.events if "pruned/sparsity" in e.get("values", {})]
    assert len(prunings) == 2 - step - (not fitting)


ONLINE = {
    **GRADUAL,
    "curvature": "online",
    "online": {"every": 4, "samples": 16},
    "fls": {"steps": 20, "batch": 16, "check_every": 10},
}


@pytest.mark.parametrize("method", ["fls", "kfac", "obs", "diagonal"])
def test_online_curvature_rides_on_the_training(method: str, dense: Ran, tmp_path: Path) -> None:
    """Only the first step makes a pass of its own; later estimates are not that of the first."""
    inputs = {"model": dense.output()}
    ran = run_stage("prune_gradual", tmp_path / "online", {**ONLINE, "method": method}, inputs)
    assert_sparsity(load_model(ran.output(), "cpu"), 0.9)
    fits = {e["unit"] for e in ran.events if e["type"] == "progress" and "fit" in e["unit"]}
    assert fits == {"fit step, pruning step 1"}
    assert ran.metrics()["validation/accuracy"] > 30
    rarely = {**ONLINE, "method": method, "online": {"every": 10_000, "samples": 16}}
    other = run_stage("prune_gradual", tmp_path / "rarely", rarely, inputs)
    with pytest.raises(AssertionError):
        assert_same_model(ran.output(), other.output())


@pytest.mark.parametrize("method", ["fls", "kfac"])
@pytest.mark.parametrize("step", [0, 1])
def test_online_curvature_that_was_killed_reaches_the_same_bits(
    method: str, step: int, dense: Ran, tmp_path: Path
) -> None:
    params = {**ONLINE, "method": method}
    inputs = {"model": dense.output()}
    whole = run_stage("prune_gradual", tmp_path / "whole", params, inputs)
    ctx = Context(
        params=STAGES["prune_gradual"].params.model_validate(params),
        folder=tmp_path / "killed",
        inputs={"model": [artifact(dense.output())]},
        emit=stop_in(tmp_path / "killed", step, fitting=False),
        checkpoint_every_s=0,
    )
    with pytest.raises(Stopped):
        prune_gradual(ctx)
    again = run_stage("prune_gradual", tmp_path / "killed", params, inputs)
    assert_same_model(whole.output(), again.output())


def test_online_curvature_needs_a_method_that_batches_can_update() -> None:
    kind = STAGES["prune_gradual"].params
    with pytest.raises(ValueError, match="expects a method that batches can update, diagonal or"):
        kind.model_validate({**ONLINE, "method": "mfac"})
    with pytest.raises(ValueError, match="at least 1 of `epochs`"):
        kind.model_validate({**ONLINE, "method": "fls", "epochs": 0})


def test_several_steps_without_training_are_multistep(dense: Ran, tmp_path: Path) -> None:
    ran = run_stage(
        "prune_gradual",
        tmp_path,
        {**GRADUAL, "method": "fishleg", "epochs": 0, "steps": 2},
        {"model": dense.output()},
    )
    model = load_model(ran.output(), "cpu")
    assert model.facts.mode == "multistep"
    assert_sparsity(model, 0.9)


def test_a_schedule_does_not_bring_weights_back(
    dense: Ran, estimates: dict[str, Ran], tmp_path: Path
) -> None:
    sparse = prune(tmp_path / "p", dense, estimates["magnitude"], sparsity=0.95)
    with pytest.raises(StageError, match=r"sparsity: 0.9 is below 0.95"):
        run_stage(
            "prune_gradual",
            tmp_path / "g",
            {**GRADUAL, "method": "magnitude"},
            {"model": sparse.output()},
        )


def test_a_wrong_option_is_the_users_error(dense: Ran, tmp_path: Path) -> None:
    params = {**QUICK, "method": "kfac", "options": {"rank": 3}}
    with pytest.raises(ValidationError, match="unknown kfac option 'rank'; known: dense_size"):
        run_stage("curvature", tmp_path, params, {"model": dense.output()})
    own = {**params, "method": "fishleg.estimators:KFAC"}  # by its import path it checks itself
    with pytest.raises(StageError, match="curvature method 'fishleg.estimators:KFAC': .*rank"):
        run_stage("curvature", tmp_path, own, {"model": dense.output()})


def test_options_of_other_methods_do_not_enter_the_parameters() -> None:
    one = CurvatureParams(method="obs", fishleg=FishLegParams(sweeps=9))
    assert one == CurvatureParams(method="obs")
    assert CurvatureParams(method="fishleg", fishleg=FishLegParams(sweeps=9)).fishleg.sweeps == 9
    learned = GradualParams(method="fishleg", sparsity=0.5, eigen=EigenParams(shrinkage=0.1))
    assert learned == GradualParams(method="fishleg", sparsity=0.5)
    assert CurvatureParams(method="eigen", fishleg=FishLegParams(sweeps=9)).eigen == EigenParams()


def test_the_recipe_of_an_estimate_that_an_earlier_version_stored_is_read() -> None:
    stored = {
        "method": {
            "name": "obs",
            "target": "fishleg.estimators:OBS",
            "argument": None,
            "digest": None,
        },
        "damping": 0.001,
        "options": {"block_size": 16},
        "calibration": {
            "samples": 60,
            "labels": "matched",
            "draws": 1,
            "batch_size": 20,
            "seed": 0,
        },
    }
    recipe = Recipe.from_json(stored)
    calibration = {**stored["calibration"], "augment": False}
    assert recipe.to_json() == {**stored, "calibration": calibration}
    params = CurvatureParams(
        method="obs", damping=0.001, obs=ObsParams(block_size=16), samples=60, batch_size=20
    )
    partition = partition_parameters(nn.Linear(4, 4))
    for one in (recipe, Recipe.from_params(params)):
        assert one.calibration == recipe.calibration
        assert one.build(partition).options == ObsOptions(block_size=16)


def test_the_recipe_of_fishleg_in_structure_eigen_is_that_of_eigen() -> None:
    params = CurvatureParams(method="eigen", eigen=EigenParams(shrinkage=0.25))
    recipe = Recipe.from_params(params)
    stored = recipe.to_json()
    stored["method"] |= {"name": "fishleg", "target": "fishleg.estimators:FishLeg"}
    stored["options"] = {
        "structure": "eigen",
        "warm_start": "kfac",
        "shrinkage": 0.25,
        "sweeps": 5,
        "steps": 200,
        "memory_bytes": 2 << 30,
    }
    assert Recipe.from_json(stored) == recipe
    stored["options"]["structure"] = "tensor"
    assert "shrinkage" not in Recipe.from_json(stored).options
