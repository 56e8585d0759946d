"""What of a data set enters the key of the cell that names it, and what is said if nothing does."""

from pathlib import Path

import pytest

from pipeline.planning.planner import Plan, make_plan
from pipeline.spec.load import load_spec
from pipeline.store.store import Store


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHLEG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("train/cat/1.png", "test/cat/2.png"):
        path = Path("data/pets", name)
        path.parent.mkdir(parents=True)
        path.write_text(name)
    Path("own_data.py").write_text("def load(root, *, download=False): ...\n")


def plan(dataset: str, extra: str = "") -> Plan:
    Path("p.yaml").write_text(
        "name: data\nplugins: [stages.catalogue]\nstages:\n"
        f"  dense: {{uses: pretrain, params: {{dataset: '{dataset}', model: mlpnet{extra}}}}}\n"
    )
    return make_plan(load_spec(Path("p.yaml")), Store(".fls"))


@pytest.mark.parametrize("path", ["pets", "/pets"])
def test_a_tree_of_images_enters_by_its_content(tmp_path: Path, path: str) -> None:
    name = f"folder:{tmp_path / 'data'}{path}" if path.startswith("/") else f"folder:{path}"
    before = plan(name)
    assert list(before.cells[0].ingredients["data"]) == ["dataset"]
    assert before.notes == []
    assert plan(name).cells[0].key == before.cells[0].key
    Path("data/pets/test/cat/2.png").write_text("other")
    assert plan(name).cells[0].key != before.cells[0].key


@pytest.mark.parametrize(
    ("dataset", "extra", "unchecked"),
    [
        ("digits", "", False),
        ("digits", ", verify: false", True),
        ("folder:pets", "", False),
        ("folder:pets", ", verify: false", False),
        ("folder:nowhere", "", True),
        ("cifar100", "", True),
        ("own_data:load", "", True),
    ],
)
def test_what_is_not_checked_is_said(dataset: str, extra: str, unchecked: bool) -> None:
    made = plan(dataset, extra)
    assert [note.partition(". ")[0] for note in made.notes] == (
        ["Data not checked: dense"] if unchecked else []
    )
    assert made.cells[0].why.endswith("; data not checked: params.dataset") is unchecked


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("cifar100", "cifar-100-python/train"),
        ("cifar100", "cifar-100-binary/test.bin"),
        ("fashion_mnist", "FashionMNIST/raw/train-labels-idx1-ubyte"),
        ("tiny_imagenet", "tiny-imagenet-200/val/val_annotations.txt"),
    ],
)
def test_a_set_without_a_declared_digest_enters_by_its_folder(dataset: str, file: str) -> None:
    path = Path("data", file)
    for name in ("train", "test", "train.bin", "test.bin"):
        if dataset == "cifar100" and ("." in name) == ("binary" in file):
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (path.parent / name).write_text(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("some")
    before = plan(dataset)
    assert list(before.cells[0].ingredients["data"]) == ["dataset"]
    assert before.notes == []
    path.write_text("other")
    assert plan(dataset).cells[0].key != before.cells[0].key
