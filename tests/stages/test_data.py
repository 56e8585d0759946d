"""Data sets: the arrays, whatever the files; splits, digests, batches, and what is said of gaps."""

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.stage import StageError
from stages.catalogue import DATASETS, PretrainParams
from stages.data import cifar, image_folder, mnist
from stages.data.batches import batches_per_epoch, crop, training_batches
from stages.data.dataset import DataSet, Split, digest_arrays, spread
from stages.data.source import DataSource, load_data


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, draw.integers(0, 10, count, dtype=np.uint8)


def write_binary(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for seed, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        pixels, labels = rows(8, seed)
        (folder / f"{name}.bin").write_bytes(
            np.concatenate([labels[:, None], pixels], axis=1).tobytes()
        )


def write_python(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for seed, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        pixels, labels = rows(8, seed)
        batch = {"batch_label": name, "labels": labels.tolist(), "data": pixels}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_both_versions_of_cifar10_give_the_same_arrays(tmp_path: Path) -> None:
    write_binary(tmp_path / "binary")
    write_python(tmp_path / "python")
    binary, python = (cifar.load_cifar10(tmp_path / name) for name in ("binary", "python"))
    assert digest_arrays(binary) == digest_arrays(python)
    pixels, labels = rows(8, 0)
    assert binary.train.inputs[0].flatten().tolist() == pixels[0].tolist()
    assert binary.train.labels[:8].tolist() == labels.tolist()
    assert (len(binary.train), len(binary.validation), len(binary.test)) == (20, 20, 8)


def test_cifar100_binary_uses_the_fine_label(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    pixels, _ = rows(4, 0)
    both = np.array([[1, 42]] * 4, dtype=np.uint8)
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(np.concatenate([both, pixels], axis=1).tobytes())
    assert cifar.load_cifar100(tmp_path).test.labels.tolist() == [42] * 4


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path) -> None:
    write_python(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(print))
    with pytest.raises(StageError, match="no place in a CIFAR batch"):
        cifar.load_cifar10(tmp_path)


def test_a_cut_binary_file_is_reported(tmp_path: Path) -> None:
    write_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StageError, match=r"test_batch.bin: .* the file is damaged"):
        cifar.load_cifar10(tmp_path)


def write_mnist(root: Path, packed: bool) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in (("train", 6), ("t10k", 3)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = draw.integers(0, 10, count, dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            data += array.tobytes()
            suffix = ".gz" if packed else ""
            path = folder / f"{name}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(data) if packed else data)


def test_mnist_is_the_same_packed_and_plain(tmp_path: Path) -> None:
    write_mnist(tmp_path / "plain", packed=False)
    write_mnist(tmp_path / "packed", packed=True)
    plain, packed = (mnist.load_mnist(tmp_path / name) for name in ("plain", "packed"))
    assert digest_arrays(plain) == digest_arrays(packed)
    assert plain.train.inputs.shape == (3, 1, 28, 28)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train-labels-idx1-ubyte.gz", b"\x1f\x8b no archive"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(bytes(100), mtime=0)[:-12]),
        ("t10k-labels-idx1-ubyte", b"\0\0"),
        ("t10k-labels-idx1-ubyte", struct.pack(">HBB2I", 0, 8, 2, 1, 3) + bytes(3)),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    write_mnist(tmp_path, packed=name.endswith(".gz"))
    (tmp_path / "MNIST" / "raw" / name).write_bytes(data)
    with pytest.raises(StageError, match=rf"{name}.*remove it and get it again"):
        mnist.load_mnist(tmp_path)


@pytest.mark.parametrize("labels", [[0.5] * 8, [0] * 7])
def test_a_cifar_batch_with_other_labels_is_named(tmp_path: Path, labels: list[float]) -> None:
    write_python(tmp_path)
    pixels, _ = rows(8, 0)
    batch = {"labels": labels, "data": pixels}
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(StageError, match=r"data_batch_3: expected as many rows of 3072 bytes"):
        cifar.load_cifar10(tmp_path)


def test_digits_are_split_evenly_in_every_class() -> None:
    dataset, source = load_data(source_of("digits"))
    assert source.reference.digest == DATASETS.entries["digits"].digest
    for split, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        counts = dataset.split(split).labels.bincount()
        assert counts.min() / 1797 == pytest.approx(share / 10, rel=0.1)
    assert sum(len(dataset.split(name)) for name in ("train", "validation", "test")) == 1797


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_the_published_data_have_the_declared_digests(
    name: str, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHLEG_DATA", str(published))
    dataset, source = load_data(source_of(name))
    assert source.reference.digest == DATASETS.entries[name].digest
    assert dataset.train.inputs.shape[1] == DATASETS.entries[name].sizes["channels"]
    assert len(dataset.validation) == 5000
    assert len(dataset.test) == 10000


def source_of(name: str, **changes: Any) -> DataSource:
    return DataSource.from_params(PretrainParams(dataset=name, model="mlpnet", **changes))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("cifar10", r"cifar-10-batches-bin/\{data_batch_1.bin,.*\n.*cifar-10-batches-py/"),
        ("cifar100", "cifar-100-binary/"),
        ("mnist", "MNIST/raw/"),
        ("fashion_mnist", "FashionMNIST/raw/"),
        ("tiny_imagenet", "tiny-imagenet-200/val/val_annotations.txt|val/val_annotations"),
    ],
)
def test_missing_data_name_folder_layout_and_download(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHLEG_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(StageError, match=layout) as raised:
        load_data(source_of(name))
    assert str(tmp_path / "nowhere") in str(raised.value)
    assert "`download: true`" in str(raised.value)
    assert "FISHLEG_DATA" in str(raised.value)


def test_cut_down_data_need_verify_false(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_binary(tmp_path)
    monkeypatch.setenv("FISHLEG_DATA", str(tmp_path))
    with pytest.raises(StageError, match="`verify: false`"):
        load_data(source_of("cifar10"))
    dataset, source = load_data(source_of("cifar10", verify=False))
    assert len(dataset.train) == 20
    assert not source.verify


def test_changed_data_are_noticed_by_the_next_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHLEG_DATA", str(tmp_path))
    write_tree(tmp_path / "pictures", {"train": 4, "test": 2})
    _, source = load_data(source_of("folder:pictures"))
    assert source.reference.digest is not None
    write_tree(tmp_path / "pictures", {"train": 5, "test": 2})
    with pytest.raises(StageError, match="expected"):
        load_data(source)


def test_a_source_survives_json() -> None:
    source = source_of("own:load", mean=[0.1], subset=12, dataset_args={"a": 1})
    assert DataSource.from_json(source.to_json()) == source


def write_tree(
    root: Path, counts: dict[str, int], size: Callable[[int], int] = lambda i: 16
) -> None:
    """Write images of two classes whose grey level tells split, class and number."""
    for split, count in counts.items():
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                level = 100 * label + 10 * len(split) + number
                image = Image.new("RGB", (size(number), size(number)), (level, 0, level))
                image.save(folder / f"{number:03d}.png")


def test_a_tree_of_images(tmp_path: Path) -> None:
    write_tree(tmp_path / "pets", {"train": 10, "val": 2, "test": 3})
    dataset = image_folder.load("pets", tmp_path)
    assert dataset.train.inputs.shape == (20, 3, 16, 16)
    assert dataset.train.labels.tolist() == [0] * 10 + [1] * 10
    assert dataset.test.inputs[-1, 0, 0, 0] == 100 + 40 + 2
    again = image_folder.load("pets", tmp_path)
    assert digest_arrays(again) == digest_arrays(dataset)
    assert len(list((tmp_path / "pets").glob(".decoded-*.safetensors"))) == 1


def test_a_tree_without_validation_sets_some_training_images_apart(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train": 10, "test": 3})
    dataset = image_folder.load(".", tmp_path)
    assert dataset.validation.labels.tolist() == [0, 1]
    assert len(dataset.train) == 18


def test_images_of_different_sizes_need_image_size(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train": 3, "test": 1}, size=lambda number: 16 + number)
    with pytest.raises(StageError, match="image_size"):
        image_folder.load(".", tmp_path)
    assert image_folder.load(".", tmp_path, image_size=8).train.inputs.shape[1:] == (3, 8, 8)


def test_a_tree_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="train/CLASS/IMAGE"):
        image_folder.load("nowhere", tmp_path)


def small(count: int = 10, **changes: Any) -> DataSet:
    inputs = torch.arange(count * 16, dtype=torch.int64).remainder(251).to(torch.uint8)
    split = Split(inputs=inputs.reshape(count, 1, 4, 4), labels=torch.arange(count))
    plain: dict[str, Any] = {"num_classes": count, "mean": (0.0,), "std": (1.0,), "scale": 1.0}
    return DataSet(train=split, validation=split, test=split, **{**plain, **changes})


def all_batches(dataset: DataSet, **changes: Any) -> list[tuple[Tensor, Tensor]]:
    options = {"batch_size": 3, "seed": 5, "epoch": 0, **changes}
    return list(training_batches(dataset, **options))


def test_an_epoch_shows_each_sample_once_and_leaves_the_remainder() -> None:
    labels = torch.cat([labels for _, labels in all_batches(small())])
    assert len(labels) == 9
    assert len(set(labels.tolist())) == 9
    assert batches_per_epoch(2, 3) == 1
    assert all_batches(small(2))[0][1].sort().values.tolist() == [0, 1]


def test_batches_are_the_same_from_the_middle_on_and_differ_between_epochs() -> None:
    dataset = small(crop_padding=1, flip=True)
    whole, rest = all_batches(dataset), all_batches(dataset, start=1)
    for (inputs, labels), (inputs_again, labels_again) in zip(whole[1:], rest, strict=True):
        assert torch.equal(inputs, inputs_again)
        assert torch.equal(labels, labels_again)
    assert not torch.equal(whole[0][1], all_batches(dataset, epoch=1)[0][1])


def test_crops_and_flips_only_move_pixels() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 1, 4, 4)
    moved = crop(image, torch.tensor([[0, 2]]), padding=1)
    assert moved[0, 0].tolist() == [[0] * 4, [2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0]]
    still = crop(image, torch.tensor([[1, 1]]), padding=1)
    assert torch.equal(still, image)
    dataset = small(40, flip=True)
    for inputs, labels in all_batches(dataset, batch_size=40):
        plain = dataset.train.inputs[labels].float()
        flipped = (inputs != plain).flatten(1).any(1)
        assert torch.equal(inputs[flipped], plain[flipped].flip(-1))
        assert 8 <= int(flipped.sum()) <= 32
    without = all_batches(dataset, augment=False, batch_size=40)[0]
    assert torch.equal(without[0], dataset.train.inputs[without[1]].float())


def test_a_subset_keeps_all_classes_of_sorted_data() -> None:
    split = Split(inputs=torch.zeros(100, 1), labels=torch.arange(100) // 10)
    assert spread(split, 10).labels.tolist() == list(range(10))
    assert len(spread(split, 1000)) == 100


def test_normalisation_is_per_channel() -> None:
    dataset = small(mean=(1.0, 2.0), std=(2.0, 4.0), scale=0.5)
    batch = torch.tensor([4, 8], dtype=torch.uint8).reshape(1, 2, 1, 1)
    assert dataset.normalise(batch).flatten().tolist() == [0.5, 0.5]
