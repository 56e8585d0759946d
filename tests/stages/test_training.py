"""The training loop: interrupted runs, masks, recipes, losses that go astray."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running_stages import TINY, Ran, run_stage
from torch import nn

from pipeline.stage import Context, StageError
from stages.catalogue import PretrainParams
from stages.data.dataset import DataSet, Split
from stages.model_folder import load_model, save_model
from stages.tensor_files import load_tensors
from stages.training import Teacher, Training, learning_rate

RECIPES = [
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "adamw", "lr": 0.01, "label_smoothing": 0.1},
    {"optimizer": "fishleg", "lr": 0.3, "fishleg_optimizer": {"update_every": 5, "samples": 16}},
]


class Stopped(Exception):
    """Stands for a kill -9 just after a checkpoint."""


def stop_after(checkpoints: int) -> Any:
    """Return an event sink that stops the stage when it has made so many checkpoints."""
    seen: list[None] = []

    def sink(event: dict[str, Any]) -> None:
        if event["type"] == "checkpoint":
            seen.append(None)
            if len(seen) == checkpoints:
                raise Stopped

    return sink


def stop_in(folder: Path, step: int, *, fitting: bool, times: int = 2) -> Any:
    """Return an event sink that stops a stepwise pruning at the n-th checkpoint of a phase."""
    seen: list[None] = []

    def sink(event: dict[str, Any]) -> None:
        if event["type"] == "checkpoint":
            path = folder / f"checkpoints/{event['number']:06d}/checkpoint.json"
            cursor = json.loads(path.read_text())["cursor"]
            if (cursor["step"], cursor["fitting"]) == (step, fitting):
                seen.append(None)
                if len(seen) == times:
                    raise Stopped

    return sink


def assert_same_model(left: Path, right: Path) -> None:
    expected, found = (
        load_tensors(left / "model.safetensors"),
        load_tensors(right / "model.safetensors"),
    )
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["optimizer"])
@pytest.mark.parametrize("checkpoints", [3, 36], ids=["in the first epoch", "in the second"])
def test_a_run_that_was_killed_reaches_the_same_bits(
    tmp_path: Path, recipe: dict[str, Any], checkpoints: int
) -> None:
    """A checkpoint after every batch; 1085 samples make 33 batches an epoch."""
    params = {**TINY, "epochs": 2, "batch_size": 32, **recipe}
    whole = run_stage("pretrain", tmp_path / "whole", params)
    ctx = Context(
        params=PretrainParams.model_validate(params),
        folder=tmp_path / "killed",
        emit=stop_after(checkpoints),
        checkpoint_every_s=0,
    )
    from stages.pretrain import pretrain

    with pytest.raises(Stopped):
        pretrain(ctx)
    again = run_stage("pretrain", tmp_path / "killed", params)
    assert f"resuming from epoch {checkpoints // 33}, batch {checkpoints % 33}" in again.texts()
    assert_same_model(whole.output(), again.output())
    last = [event["values"] for event in whole.events if event.get("step") == 2]
    assert last == [event["values"] for event in again.events if event.get("step") == 2]


def test_dropout_is_the_same_after_a_resume(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))

    whole, first = (training_of(make(), epochs=2) for _ in range(2))
    whole.run(Context(params=None, folder=tmp_path / "whole"))
    ctx = Context(params=None, folder=tmp_path, emit=stop_after(2), checkpoint_every_s=0)
    with pytest.raises(Stopped):
        first.run(ctx)
    second = training_of(make(), epochs=2)
    second.resume(Context(params=None, folder=tmp_path))
    torch.rand(7)  # what the process drew before does not matter
    second.run(Context(params=None, folder=tmp_path))
    assert torch.equal(whole.network[3].weight, second.network[3].weight)  # type: ignore[index]


def training_of(network: nn.Module, **changes: Any) -> Training:
    """A training on 24 random samples of two classes, 4 batches an epoch."""
    draw = torch.Generator().manual_seed(1)
    samples = Split(
        inputs=torch.randint(0, 255, (24, 1, 2, 2), generator=draw, dtype=torch.uint8),
        labels=torch.arange(24) % 2,
    )
    dataset = DataSet(
        train=samples,
        validation=samples,
        test=samples,
        num_classes=2,
        mean=(0.5,),
        std=(0.5,),
    )
    params = PretrainParams(dataset="digits", model="mlpnet", batch_size=6)
    teacher, masks = changes.pop("teacher", None), changes.pop("masks", None)
    recipe = params.model_copy(update=changes)
    return Training(network, dataset, recipe, teacher=teacher, masks=masks)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["optimizer"])
def test_removed_weights_are_zero_after_every_step(
    dense: Ran, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    model = load_model(dense.output(), "cpu")
    weight = model.network.get_parameter("block.conv2.weight")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    with torch.no_grad():
        weight.masked_fill_(~mask, 0)
    model.masks["block.conv2.weight"] = mask
    save_model(tmp_path, model.with_facts(target=0.1, method="magnitude", mode="oneshot"))
    ran = run_stage(
        "finetune",
        tmp_path / "run",
        {"epochs": 1, "batch_size": 32, **recipe},
        {"model": tmp_path, "teacher": dense.output()},
    )
    after = load_model(ran.output(), "cpu")
    tuned = after.network.get_parameter("block.conv2.weight")
    assert torch.equal(tuned != 0, mask)
    assert torch.equal(after.masks["block.conv2.weight"], mask)
    assert after.facts.finetuned
    assert (after.facts.method, after.facts.mode) == ("magnitude", "oneshot")
    assert not torch.equal(tuned[mask], weight[mask])


def test_a_teacher_alone_is_imitated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2))
    training = training_of(
        student,
        epochs=80,
        weight_decay=0.0,
        teacher=Teacher(network=teacher, weight=1.0, temperature=2.0),
    )
    training.run(Context(params=None, folder=tmp_path))
    inputs = training.dataset.normalise(training.dataset.train.inputs)
    torch.testing.assert_close(
        student(inputs).softmax(-1), teacher(inputs).softmax(-1), atol=0.02, rtol=0
    )


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    training = training_of(network, epochs=3)
    ctx = Context(params=None, folder=tmp_path, checkpoint_every_s=0)
    training.run(ctx)
    kept = ctx.last_checkpoint()
    assert kept is not None
    with torch.no_grad():
        network[1].weight.fill_(float("nan"))
    training.epoch = 2
    with pytest.raises(StageError, match=r"became nan in epoch 3.*Lower lr"):
        training.run(ctx)
    assert ctx.last_checkpoint() == kept
    assert all(t.isfinite().all() for t in load_tensors(kept / "checkpoint.safetensors").values())


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    params: Any = SimpleNamespace(lr=1.0, epochs=4, warmup_epochs=1)
    rates = [learning_rate(params, step, 10) for step in range(40)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_pretrain_learns_and_reports(dense: Ran) -> None:
    facts = json.loads((dense.output() / "model.json").read_text())
    assert facts["method"] == facts["mode"] == "dense"
    assert facts["nonzero"] == facts["prunable"] < facts["parameters"]
    assert dense.metrics()["validation/accuracy"] > 80
    steps = [event["step"] for event in dense.events if event.get("step") is not None]
    assert steps == list(range(1, 13))


def test_seeds_give_different_networks(tmp_path: Path, dense: Ran) -> None:
    params = {**TINY, "epochs": 0, "batch_size": 32}
    one, two = (run_stage("pretrain", tmp_path / str(s), {**params, "seed": s}) for s in (0, 1))
    weights = [load_tensors(ran.output() / "model.safetensors")["fc1.weight"] for ran in (one, two)]
    assert not torch.equal(*weights)


def test_the_dense_accuracy_travels_with_the_model(dense: Ran, tmp_path: Path) -> None:
    model = load_model(dense.output(), "cpu")
    measured = {"validation": dense.metrics()["validation/accuracy"]}
    assert model.facts.dense_accuracy == measured
    assert model.facts.dense_accuracy_on("test") == measured["validation"]
    tuned = run_stage("finetune", tmp_path, {"epochs": 0}, {"model": dense.output()})
    facts = json.loads((tuned.output() / "model.json").read_text())
    assert facts["dense_accuracy"] == measured
