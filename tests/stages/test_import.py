"""Checkpoints from elsewhere: their zeros, their names, and the accuracy expected of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running_stages import TINY, Ran, artifact, run_stage
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune as torch_prune

from pipeline.base.errors import BadInput
from pipeline.spec.load import load_spec
from pipeline.stage import StageError
from stages.catalogue import EvaluateParams, ImportParams
from stages.exporter import export
from stages.model_folder import load_model

SHORT = {"samples": 40, "certificate_samples": 0, "method": "magnitude"}


def import_file(path: Path, folder: Path, **params: Any) -> Ran:
    return run_stage("import_checkpoint", folder, {**TINY, "path": str(path), **params})


def prune(folder: Path, model: Path, sparsity: float) -> Path:
    estimate = run_stage("curvature", folder / "curvature", SHORT, {"model": model})
    inputs = {"model": model, "curvature": estimate.output("curvature")}
    params = {"sparsity": sparsity, "certificate_samples": 0}
    return run_stage("prune_oneshot", folder / "oneshot", params, inputs).output()


def facts_of(model: Path) -> dict[str, Any]:
    return json.loads((model / "model.json").read_text())


def zeros_of(model: Path) -> dict[str, Any]:
    """Return state-dict name -> where the prunable weights are 0."""
    loaded = load_model(model, "cpu")
    state = loaded.network.state_dict()
    prunable = loaded.facts.partition(loaded.network).prunable
    return {group.weight: state[group.weight] == 0 for group in prunable}


def assert_zeros_kept(before: Path, after: Path) -> None:
    found = zeros_of(after)
    for name, zeros in zeros_of(before).items():
        assert found[name][zeros].all(), name


@pytest.fixture(scope="module")
def pruned(dense: Ran, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network at sparsity 0.8."""
    return prune(tmp_path_factory.mktemp("pruned"), dense.output(), 0.8)


@pytest.fixture(scope="module")
def exported(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file, as `fls export` writes it."""
    folder = tmp_path_factory.mktemp("exported")
    export(pruned, folder)
    return folder / "model.safetensors"


# ---------------------------------------------------------------------------------- zeros


def test_an_exported_model_comes_back_with_its_masks_and_keeps_them_in_fine_tuning(
    pruned: Path, exported: Path, tmp_path: Path
) -> None:
    """The failing case: it was dense after fine-tuning, and its row said sparsity 0."""
    expected = facts_of(pruned)["nonzero"]
    ran = import_file(exported, tmp_path / "import")
    facts = facts_of(ran.output())
    removed = facts["prunable"] - expected
    assert facts["nonzero"] == expected
    assert facts["sparsity"] == removed / facts["prunable"]
    assert (facts["method"], facts["mode"]) == ("imported", "imported")
    assert f"zeros: keep: {removed:,} of {facts['prunable']:,} prunable weights" in ran.texts()
    assert "fc1 " in ran.texts()
    recipe = {"epochs": 1, "batch_size": 32}
    tuned = run_stage("finetune", tmp_path / "tuned", recipe, {"model": ran.output()}).output()
    assert facts_of(tuned)["nonzero"] == expected
    assert_zeros_kept(pruned, tuned)
    rows = run_stage("evaluate", tmp_path / "rows", {}, {"models": tuned}).output("results")
    (row,) = json.loads((rows / "rows.json").read_text())
    assert row["sparsity"] == pytest.approx(removed / facts["prunable"])


def test_an_exported_model_keeps_also_the_masks_of_layers_that_lost_little(
    dense: Ran, tmp_path: Path
) -> None:
    """Below 1 % of a layer zeros alone would not do: the exported file says what they are."""
    little = prune(tmp_path, dense.output(), 0.004)
    export(little, tmp_path / "exported")
    imported = import_file(tmp_path / "exported" / "model.safetensors", tmp_path / "import")
    recipe = {"epochs": 1, "batch_size": 32}
    inputs = {"model": imported.output()}
    tuned = run_stage("finetune", tmp_path / "tuned", recipe, inputs).output()
    assert facts_of(tuned)["nonzero"] == facts_of(little)["nonzero"]
    assert facts_of(tuned)["nonzero"] < facts_of(tuned)["prunable"]


def test_zeros_may_be_trained_again(exported: Path, pruned: Path, tmp_path: Path) -> None:
    ran = import_file(exported, tmp_path / "import", zeros="free")
    assert "are 0 and may be trained again" in ran.texts()
    assert facts_of(ran.output())["mode"] == "imported"  # among dense networks it has no place
    recipe = {"epochs": 1, "batch_size": 32}
    tuned = run_stage("finetune", tmp_path / "tuned", recipe, {"model": ran.output()}).output()
    facts = facts_of(tuned)  # some rectifiers are dead, and their weights stay 0
    assert facts["nonzero"] > 0.9 * facts["prunable"] > 4 * facts_of(pruned)["nonzero"]


@pytest.mark.parametrize("stage", ["prune_oneshot", "prune_gradual", "prune_multistep"])
def test_further_pruning_keeps_the_zeros_that_were_imported(
    exported: Path, pruned: Path, tmp_path: Path, stage: str
) -> None:
    model = import_file(exported, tmp_path / "import").output()
    if stage == "prune_oneshot":
        after = prune(tmp_path, model, 0.9)
    else:
        params: dict[str, Any] = {"method": "diagonal", "samples": 40, "sparsity": 0.9, "steps": 2}
        if stage == "prune_gradual":
            params |= {"epochs": 1}
        else:
            params |= {"refine": "adam", "refinement": {"samples": 60, "steps": 3}}
        after = run_stage(stage, tmp_path / "stage", params, {"model": model}).output()
    facts = facts_of(after)
    assert facts["nonzero"] == facts["prunable"] - int(0.9 * facts["prunable"] + 0.5)
    assert_zeros_kept(pruned, after)
    assert facts["dense_accuracy"] == facts_of(model)["dense_accuracy"]


def test_a_budget_is_spent_from_the_sparsity_that_was_imported(
    exported: Path, pruned: Path, tmp_path: Path
) -> None:
    """The failing case: bisection tried a half first, which is below what was removed already."""
    model = import_file(exported, tmp_path / "import").output()
    estimate = run_stage("curvature", tmp_path / "curvature", SHORT, {"model": model})
    inputs = {"model": model, "curvature": estimate.output("curvature")}
    for points in (0.0, 100.0):
        params = {"within": points, "certificate_samples": 0}
        after = run_stage("prune_oneshot", tmp_path / str(points), params, inputs).output()
        assert facts_of(after)["nonzero"] <= facts_of(pruned)["nonzero"]
        assert_zeros_kept(pruned, after)
    assert facts_of(after)["target"] == 1023 / 1024


def test_a_layer_whose_weights_are_all_0_is_named(dense: Ran, tmp_path: Path) -> None:
    """Some heads begin at 0; a mask of all of it would keep them there."""
    tensors = load_file(dense.output() / "model.safetensors")
    tensors["fc2.weight"].zero_()
    save_file(tensors, tmp_path / "x.safetensors")
    told = "zeros: fc2: every weight is 0 and masked, so no training changes it"
    kept = import_file(tmp_path / "x.safetensors", tmp_path / "kept")
    free = import_file(tmp_path / "x.safetensors", tmp_path / "free", zeros="free")
    assert told in kept.texts()
    assert told not in free.texts()


def test_a_few_zeros_are_no_mask(dense: Ran, tmp_path: Path) -> None:
    """Below 1 % of a layer: chance, an unlucky rectifier, a rounded weight."""
    tensors = load_file(dense.output() / "model.safetensors")
    tensors["fc1.weight"].view(-1)[:2] = 0
    save_file(tensors, tmp_path / "few.safetensors")
    ran = import_file(tmp_path / "few.safetensors", tmp_path / "import")
    assert facts_of(ran.output())["mode"] == "dense"
    assert "zeros:" not in ran.texts()


def test_masks_of_torch_are_applied_and_kept(dense: Ran, tmp_path: Path) -> None:
    """Also where they remove less than 1 %, and where the weight under them is not 0."""
    network = load_model(dense.output(), "cpu").network
    torch_prune.random_unstructured(network.get_submodule("fc1"), "weight", amount=0.5)
    torch_prune.random_unstructured(network.get_submodule("fc2"), "weight", amount=1)
    torch_prune.random_unstructured(network.get_submodule("fc2"), "bias", amount=1)
    state = network.state_dict()
    assert {"fc1.weight_orig", "fc1.weight_mask"} <= state.keys()
    save_file(state, tmp_path / "torch.safetensors")
    ran = import_file(tmp_path / "torch.safetensors", tmp_path / "import")
    assert "3 masks of torch.nn.utils.prune were applied" in ran.texts()
    assert "not prunable, so training does not keep their masks: fc2.bias" in (ran.texts())
    zeros = zeros_of(ran.output())
    for name in ("fc1", "fc2"):
        assert torch.equal(zeros[f"{name}.weight"], state[f"{name}.weight_mask"] == 0)
    recipe = {"epochs": 1, "batch_size": 32}
    tuned = run_stage("finetune", tmp_path / "tuned", recipe, {"model": ran.output()}).output()
    assert facts_of(tuned)["nonzero"] == facts_of(ran.output())["nonzero"]
    assert zeros_of(tuned)["fc2.weight"].sum() == 1


# ---------------------------------------------------------------------------------- names


def renamed(dense: Ran, path: Path, prefix: str) -> Path:
    tensors = load_file(dense.output() / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_the_prefix_of_a_wrapper_is_removed_with_a_note(
    dense: Ran, tmp_path: Path, prefix: str
) -> None:
    ran = import_file(renamed(dense, tmp_path / "x.safetensors", prefix), tmp_path / "import")
    assert f"'{prefix}' was removed from the names in the file" in ran.texts()
    assert facts_of(ran.output())["dense_accuracy"] == facts_of(dense.output())["dense_accuracy"]


def test_names_that_do_not_fit_are_told_with_the_nearest(dense: Ran, tmp_path: Path) -> None:
    tensors = load_file(dense.output() / "model.safetensors")
    tensors["fc1.wieght"] = tensors.pop("fc1.weight")
    tensors["fc2.weight"] = tensors["fc2.weight"].T.contiguous()
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(StageError) as raised:
        import_file(path, tmp_path / "import")
    text = str(raised.value)
    assert f"{path} does not fit the network: The file lacks fc1.weight (near: fc1.wieght)." in text
    assert "The network has no fc1.wieght (near: fc1.weight)." in text
    assert "Other shapes in the file: fc2.weight (16, 10) (the network's is (10, 16))." in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.index_fill(0, torch.tensor([1]), float("nan")), "not finite.*fc1.weight"),
        (lambda one: (one * 100).to(torch.int8), "Other kinds of number.*fc1.weight int8"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(
    dense: Ran, tmp_path: Path, change: Any, message: str
) -> None:
    tensors = load_file(dense.output() / "model.safetensors")
    tensors["fc1.weight"] = change(tensors["fc1.weight"])
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(StageError, match=message):
        import_file(tmp_path / "x.safetensors", tmp_path / "import")


# ------------------------------------------------------------------------------- accuracy


def test_values_out_of_range_are_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        "name: x\n"
        "plugins: [stages]\n"
        "stages:\n"
        "  dense:\n"
        "    uses: import_checkpoint\n"
        "    params:\n"
        f"      path: {tmp_path}/x.safetensors\n"
        "      model: digits_resnet\n"
        "      dataset: digits\n"
        "      zeros: kep\n"
        "      expect_accuracy: 101\n"
        "      expect_split: train\n"
        "      std: [0.5, 0]\n"
    )
    with pytest.raises(BadInput) as raised:
        load_spec(path)
    for expected in (
        ":10:14: zeros: expected 'keep' or 'free'",
        ":11:24: expect_accuracy: expected less than or equal to 100",
        ":12:21: expect_split: expected 'test' or 'validation'",
        ":13:18: std.1: expected greater than 0",
    ):
        assert expected in str(raised.value)


def test_what_belongs_to_no_expectation_enters_no_key() -> None:
    plain = {**TINY, "path": "-"}
    idle = {**plain, "expect_margin": 3.0, "expect_split": "validation"}
    assert ImportParams.model_validate(idle) == ImportParams.model_validate(plain)
    assert EvaluateParams(expect_margin=3.0) == EvaluateParams()


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_expected_accuracy_is_required(dense: Ran, tmp_path: Path, split: str) -> None:
    """The failing case: inputs normalised otherwise than in training, and no word."""
    path = dense.output() / "model.safetensors"
    rows = run_stage("evaluate", tmp_path / "rows", {"split": split}, {"models": dense.output()})
    found = json.loads((rows.output("results") / "rows.json").read_text())[0]["accuracy"]
    expected = {"expect_accuracy": round(found, 1), "expect_split": split}
    ran = import_file(path, tmp_path / "right", **expected)
    assert facts_of(ran.output())["dense_accuracy"][split] == found
    assert f"{found:.2f} % on the {split} split" in ran.texts().splitlines()[0]
    with pytest.raises(StageError) as raised:
        import_file(path, tmp_path / "wrong", **expected, mean=[30.0], std=[0.376])
    text = str(raised.value)
    assert f"samples of the {split} split, expected {found:.1f} % within 1 (expect_margin)" in text
    assert "(x * 0.0625 - [30]) / [0.376]" in text
    assert str(path) in text
    import_file(path, tmp_path / "wide", **expected, mean=[30.0], std=[0.376], expect_margin=100.0)


def test_evaluate_says_the_dense_accuracy_first(dense: Ran, pruned: Path, tmp_path: Path) -> None:
    found = facts_of(dense.output())["dense_accuracy"]["validation"]
    ran = run_stage("evaluate", tmp_path, {}, {"models": pruned})
    first = next(event for event in ran.events if event["type"] != "metrics")
    assert first["text"] == f"dense accuracy: {found:.2f} % on the validation split"


def test_evaluate_requires_the_accuracy_expected_of_dense_networks(
    dense: Ran, pruned: Path, exported: Path, tmp_path: Path
) -> None:
    """Of those that it measures, and of those that pruned models know of; of no pruned one."""
    run_stage("evaluate", tmp_path / "measured", {}, {"models": dense.output()})
    rows = json.loads((tmp_path / "measured/outputs/results/rows.json").read_text())
    found = rows[0]["accuracy"]
    right, wrong = {"expect_accuracy": found}, {"expect_accuracy": found - 3}
    many = [artifact(pruned, "pruned"), artifact(dense.output(), "dense")]
    ran = run_stage("evaluate", tmp_path / "right", right, {"models": many})
    rows = json.loads((ran.output("results") / "rows.json").read_text())
    assert [row["model_cell"] for row in rows] == ["pruned", "dense"]
    with pytest.raises(StageError, match=r"expect_accuracy: found .* test split.*; dense is anoth"):
        run_stage("evaluate", tmp_path / "wrong", wrong, {"models": many})
    known = facts_of(pruned)["dense_accuracy"]["validation"]
    of_validation = {"split": "validation", "expect_accuracy": known - 3}
    with pytest.raises(StageError, match="the dense network of up is another network"):
        run_stage("evaluate", tmp_path / "known", of_validation, {"models": pruned})
    with pytest.raises(StageError, match="expected a dense network among the models"):
        run_stage("evaluate", tmp_path / "unknown", right, {"models": pruned})


def test_the_test_images_are_read_only_where_something_is_expected_of_them(
    dense: Ran, tmp_path: Path
) -> None:
    ran = import_file(dense.output() / "model.safetensors", tmp_path)
    assert facts_of(ran.output())["dense_accuracy"].keys() == {"validation"}


def test_a_model_made_before_dense_accuracies_were_kept_is_read(dense: Ran, tmp_path: Path) -> None:
    model = shutil.copytree(dense.output(), tmp_path / "model")
    facts = facts_of(model)
    del facts["dense_accuracy"]
    (model / "model.json").write_text(json.dumps(facts))
    assert load_model(model, "cpu").facts.dense_accuracy_on("test") is None
