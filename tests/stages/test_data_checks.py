"""What is required of every data set, checked where it is loaded: own loaders pass it as well."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from running_stages import run_stage
from torch import Tensor, nn

from pipeline.stage import StageError
from stages.catalogue import DATASETS, PretrainParams
from stages.data.checks import check
from stages.data.dataset import DataSet, Split
from stages.data.source import DataSource, load_data
from stages.exporter import load as load_export
from stages.model_folder import load_model

SPLITS = ("train", "validation", "test")
ONE_CHANNEL = {"digits", "mnist", "fashion_mnist"}


def images(count: int = 6, **changes: Any) -> DataSet:
    split = Split(
        inputs=torch.zeros(count, 1, 4, 4, dtype=torch.uint8), labels=torch.arange(count) % 2
    )
    plain: dict[str, Any] = {"num_classes": 2, "mean": (0.5,), "std": (0.5,)}
    return DataSet(**{"train": split, "validation": split, "test": split, **plain, **changes})


def values(count: int = 6, features: int = 3, **changes: Any) -> DataSet:
    split = Split(inputs=torch.randn(count, features), labels=torch.arange(count) % 2)
    return images(**{"train": split, "validation": split, "test": split, **changes})


def tokens(count: int = 6, **changes: Any) -> DataSet:
    ids = torch.arange(count * 5).reshape(count, 5) % 11
    split = Split(inputs=ids, labels=torch.arange(count) % 2)
    plain: dict[str, Any] = {"mean": (), "std": ()}
    return images(**{"train": split, "validation": split, "test": split, **plain, **changes})


def with_split(dataset: DataSet, name: str, **changes: Any) -> DataSet:
    return replace(dataset, **{name: replace(dataset.split(name), **changes)})  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [images, values, tokens])
def test_good_data_pass(make: Any) -> None:
    check(make(), "good")


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("wrong", [-1, 2, 255])
def test_a_label_that_is_no_class_is_named(name: str, wrong: int) -> None:
    labels = torch.tensor([0, 1, 0, wrong, 1, wrong])
    with pytest.raises(StageError, match=rf"'x': {name}.labels\[3\] is {wrong}; .* from 0 to 1"):
        check(with_split(images(), name, labels=labels), "x")


@pytest.mark.parametrize("name", SPLITS)
def test_an_empty_split_is_named(name: str) -> None:
    empty = Split(inputs=torch.zeros(0, 1, 4, 4, dtype=torch.uint8), labels=torch.arange(0))
    with pytest.raises(StageError, match=f"{name} has no sample"):
        check(images(**{name: empty}), "x")


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_named(name: str, wrong: float) -> None:
    inputs = torch.zeros(5000, 3)
    inputs[4500, 1] = inputs[4999, 0] = wrong
    labels = torch.zeros(5000, dtype=torch.int64)
    with pytest.raises(StageError, match=rf"{name}.inputs\[4500\] has a number that is not finite"):
        check(with_split(values(), name, inputs=inputs, labels=labels), "x")


@pytest.mark.parametrize(
    ("labels", "described"),
    [
        (torch.zeros(6), r"float32 \(6,\)"),
        (torch.zeros(6, dtype=torch.int32), r"int32 \(6,\)"),
        (torch.zeros(6, 2, dtype=torch.int64), r"int64 \(6, 2\)"),
        (torch.zeros(6, dtype=torch.bool), r"bool \(6,\)"),
    ],
)
def test_labels_are_whole_numbers_one_a_sample(labels: Tensor, described: str) -> None:
    with pytest.raises(StageError, match=rf"train.labels: expected .* got {described}"):
        check(with_split(images(), "train", labels=labels), "x")


@pytest.mark.parametrize(("count", "index"), [(5, 5), (7, 6)])
def test_inputs_and_labels_go_together(count: int, index: int) -> None:
    labels = torch.zeros(count, dtype=torch.int64)
    with pytest.raises(StageError, match=rf"test: 6 inputs and {count} labels; sample {index}"):
        check(with_split(images(), "test", labels=labels), "x")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (images(mean=(0.5,) * 3), r"mean: got 3 numbers for inputs of 1 channel, uint8 \(6, 1, 4"),
        (images(std=(0.5,) * 3), "std: got 3 numbers for inputs of 1 channel"),
        (values(mean=(0.0, 0.0)), r"mean: got 2 numbers for inputs of 3 channels, float32 \(6, 3"),
        (images(std=(0.0,)), r"std\[0\] is 0.0; expected a number above 0"),
        (values(std=(1.0, 1.0, -1.0)), r"std\[2\] is -1.0"),
        (images(std=(float("nan"),)), r"std\[0\] is nan"),
        (images(mean=(float("inf"),)), r"mean\[0\] is inf; expected a finite number"),
        (images(mean=()), "mean and std: got one of them"),
        (images(mean=0.5), "mean: expected a tuple of numbers, got 0.5"),
        (images(scale=0.0), "scale is 0.0"),
        (images(num_classes=0), "num_classes: expected a whole number of at least 1, got 0"),
        (images(num_classes=2.0), "num_classes: expected a whole number of at least 1, got 2.0"),
        (tokens(mean=(0.0,), std=(1.0,)), "mean, std: int64 inputs are ids"),
        (tokens(flip=True), r"flip: expected images \(N, C, H, W\), got int64 \(6, 5\)"),
        (values(crop_padding=1), "crop_padding: expected images"),
        (images(train=(1, 2)), "train: expected a stages.data.dataset.Split, got tuple"),
        (
            with_split(images(), "train", inputs=[1, 2]),
            "train.inputs: expected a torch.Tensor, got list",
        ),
        (
            with_split(images(), "train", inputs=torch.zeros(6, 1, 4, 4, dtype=torch.int16)),
            "train.inputs: expected one of uint8, float32, .* got int16",
        ),
        (with_split(values(), "train", inputs=torch.zeros(6)), r"one value a sample has the shape"),
        (
            with_split(images(), "test", inputs=torch.zeros(6, 3, 4, 4, dtype=torch.uint8)),
            r"test.inputs: .* of train.inputs, uint8 \(6, 1, 4, 4\), got uint8 \(6, 3, 4, 4\)",
        ),
        (with_split(images(), "validation", inputs=torch.zeros(6, 1, 4, 4)), "of train.inputs, "),
    ],
)
def test_data_that_do_not_fit_are_refused_by_name(dataset: DataSet, message: str) -> None:
    with pytest.raises(StageError, match=message):
        check(dataset, "x")


# ------------------------------------------------------------------------- own loaders


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of the user's, with loaders `good` and `ids`, and a network `words` for the ids."""
    module = ModuleType("own_data")
    module.good = lambda root, *, download=False, shade=0: images()  # type: ignore[attr-defined]
    module.bad = lambda root, *, download=False: with_split(  # type: ignore[attr-defined]
        images(), "test", labels=torch.full((6,), 9)
    )
    module.ids = lambda root, *, download=False: tokens(40)  # type: ignore[attr-defined]
    module.words = Words  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_data", module)
    yield module


class Words(nn.Module):
    """Says whether token 0 is there."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1))


def source_of(name: str, **changes: Any) -> DataSource:
    return DataSource.from_params(PretrainParams(dataset=name, model="mlpnet", **changes))


def test_own_loaders_pass_the_same_checks(own: ModuleType) -> None:
    load_data(source_of("own_data:good"))
    with pytest.raises(StageError, match=r"'own_data:bad': test.labels\[0\] is 9"):
        load_data(source_of("own_data:bad"))


def test_the_normalisation_of_the_parameters_is_checked(own: ModuleType) -> None:
    """Of data sets that the catalogue knows when a file is validated, of others when loaded."""
    three = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    with pytest.raises(ValidationError, match=r"mean: got 3 numbers, .* mnist have 1 channel;"):
        source_of("mnist", **three)
    with pytest.raises(ValidationError, match=r"std: got 2 numbers, .* folder:x have 3 channels"):
        source_of("folder:x", std=[0.5, 0.5])
    with pytest.raises(StageError, match="mean: got 3 numbers for inputs of 1 channel"):
        load_data(source_of("own_data:good", **three))
    with pytest.raises(StageError, match="int64 inputs are ids, which go to the network unchanged"):
        load_data(source_of("own_data:ids", mean=[0.5], std=[0.5]))


@pytest.mark.parametrize("name", DATASETS.entries)
def test_the_catalogue_knows_the_channels_of_each_data_set(name: str) -> None:
    assert DATASETS.entries[name].sizes["channels"] == (1 if name in ONE_CHANNEL else 3)


def test_an_unknown_option_of_a_loader_is_refused_with_the_known_ones(own: ModuleType) -> None:
    with pytest.raises(StageError, match=r"'colour'. The options of .*own_data:good.* are: shade"):
        load_data(source_of("own_data:good", dataset_args={"colour": 1}))


def test_ids_reach_the_network_as_they_are(own: ModuleType, tmp_path: Path) -> None:
    """The failing case: they were scaled to floating-point numbers, which no embedding takes."""
    assert torch.equal(tokens().normalise(tokens().train.inputs), tokens().train.inputs)
    params = {"dataset": "own_data:ids", "model": "own_data:words", "batch_size": 8, "lr": 0.1}
    dense = run_stage("pretrain", tmp_path / "dense", {**params, "epochs": 2}).output()
    curvature = {"method": "diagonal", "samples": 20, "certificate_samples": 0}
    estimate = run_stage("curvature", tmp_path / "curvature", curvature, {"model": dense})
    pruned = run_stage(
        "prune_oneshot",
        tmp_path / "pruned",
        {"sparsity": 0.5, "certificate_samples": 10},
        {"model": dense, "curvature": estimate.output("curvature")},
    ).output()
    assert load_model(pruned, "cpu").counts()["nonzero"] == 4  # of the head's 8
    network, example = load_export(pruned)
    assert (example.shape, str(example.dtype)) == ((2, 5), "int64")
    assert network(torch.from_numpy(example)).shape == (2, 2)


def test_values_without_a_normalisation_are_only_scaled() -> None:
    dataset = values(mean=(), std=(), scale=2.0)
    inputs = dataset.train.inputs
    assert torch.equal(dataset.normalise(inputs), 2 * inputs)
