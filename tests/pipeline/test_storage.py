"""A folder as storage: nothing leaves it, and what it promises outlives a power cut."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from lossy_disk import LossyDisk
from results_at_risk import KEY, check_left, publish
from toy_runs import ROOT, fls, run_here, write_spec

from pipeline.base.errors import Damaged, StorageUnavailable, StoreError
from pipeline.stage import Context
from pipeline.store.storage.local import LocalStorage
from pipeline.store.store import Store

# ------------------------------------------------------------------- nothing leaves the store


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../../x",
        "a/..",
        "/etc/passwd",
        "a//b",
        "./x",
        "",
        "a\\..\\..\\x",
        "a/\u2024\u2024/x",  # one dot leader, twice: looks like ..
        "a\uff0f..\uff0fx",  # full-width slashes
        "a\0b",
        "a/./b",
        "a\rb",
        "a/\x1b[2J",
        "a\u202eb",
        "\ud800",
        "a" * 256,
    ],
)
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_path_that_leads_out_is_refused(tmp_path: Path, kind: str, path: str) -> None:
    storage = Store(str(tmp_path / "store") if kind == "folder" else "memory://paths").storage
    for action in (
        lambda: storage.read(path),
        lambda: storage.write(path, b""),
        lambda: storage.create(path, b""),
        lambda: storage.names(path),
        lambda: storage.remove(path),
        lambda: storage.move("x", path),
        lambda: storage.move(path, "x"),
        lambda: storage.save(tmp_path, path),
        lambda: storage.load(path, tmp_path / "copy"),
        lambda: storage.local(path),
    ):
        with pytest.raises(StoreError, match="is no path inside a storage"):
            action()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_names_with_a_beginning_are_found(tmp_path: Path, kind: str) -> None:
    storage = Store(str(tmp_path / "store") if kind == "folder" else "memory://beginning").storage
    for path in ("a/1.x/file", "a/1.x-2/file", "a/1/file", "a/2.x/file", "a/1.xy"):
        storage.write(path, b"")
    assert storage.names("a", "1.x") == ["1.x", "1.x-2", "1.xy"]
    assert storage.names("a", "3") == storage.names("b", "1") == []


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "store")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine")
    storage.write("here/file", b"1")
    (tmp_path / "store/there").symlink_to(tmp_path / "outside")
    for action in (
        lambda: storage.read("there/file"),
        lambda: storage.write("there/file", b""),
        lambda: storage.create("there/new", b""),
        lambda: storage.names("there"),
        lambda: storage.remove("there"),
        lambda: storage.move("here", "there/here"),
        lambda: storage.load("there", tmp_path / "copy"),
    ):
        with pytest.raises(StoreError, match="leads out of the storage by a symbolic link"):
            action()
    assert (tmp_path / "outside/file").read_text() == "mine"
    assert os.listdir(tmp_path / "outside") == ["file"]


def test_a_store_may_itself_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    LocalStorage(tmp_path / "link").write("a/file", b"1")
    assert LocalStorage(tmp_path / "real").read("a/file") == b"1"


@pytest.mark.parametrize("planted", ["file", "folder", "dangling", "pipe"])
def test_what_is_no_file_is_neither_published_nor_taken_over(tmp_path: Path, planted: str) -> None:
    store = Store(str(tmp_path / "store"))
    attempt = store.begin_attempt(KEY)
    context = Context(params=None, folder=attempt.folder)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("secret")

    def plant(folder: Path) -> None:
        if planted == "pipe":
            os.mkfifo(folder / "planted")
        else:
            names = {"file": "secret/key", "folder": "secret", "dangling": "none"}
            (folder / "planted").symlink_to(tmp_path / names[planted])

    (context.output("number") / "number.txt").write_text("5")
    plant(context.output("number"))
    with pytest.raises(StoreError, match="planted is neither a file nor a folder"):
        attempt.publish({}, ["number"], {})
    assert store.manifest(KEY) is None

    with context.checkpoint() as folder:
        (folder / "state.txt").write_text("1")
    attempt.append_events([{"type": "checkpoint"}])
    plant(attempt.folder / "checkpoints/000001")
    second = store.begin_attempt(KEY)
    assert Context(params=None, folder=second.folder).last_checkpoint() is None


def test_a_link_planted_into_a_result_is_damage(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    publish(store, "5")
    file = tmp_path / f"store/stages/{KEY}/attempts/0001/outputs/number/number.txt"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")  # the very same bytes
    with pytest.raises(Damaged, match="neither a file nor a folder"):
        store.fetch(KEY, "number")
    assert store.set_aside(KEY)
    publish(store, "5")
    assert store.fetch(KEY, "number").is_dir()


# ------------------------------------------------------------------------------ power cuts


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LossyDisk]:
    (tmp_path / "disk").mkdir()
    disk = LossyDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.mark.parametrize("seed", [None, 1])
def test_what_is_promised_outlives_a_power_cut(
    tmp_path: Path, disk: LossyDisk, seed: int | None
) -> None:
    """Cut the power before every fsync, and after the last one."""
    lucky = None if seed is None else random.Random(seed)  # noqa: S311
    left: list[Path] = []

    def cut() -> None:
        left.append(disk.cut(tmp_path / f"cut-{len(left)}", lucky))

    with disk.recording(cut):
        publish(Store(str(disk.root / "store")), "5", checkpoints=4)
    with patch("os.fsync"):
        found = [check_left(Store(str(folder / "store"))) for folder in left]
    assert found[-1] == (True, "")  # published means published
    assert len(found) > 30
    if lucky is None:
        steps = [step for _, step in found if step]
        assert steps == sorted(steps)  # what was announced is never lost again
        assert set(steps) == {f"step {n}" for n in range(4)}


def test_what_was_announced_was_safe_before(tmp_path: Path, disk: LossyDisk) -> None:
    with disk.recording(lambda: None):
        publish(Store(str(disk.root / "store")), "5", checkpoints=1)
    synced = [str(path).replace(KEY, "KEY") for path in disk.synced]
    attempt = "store/stages/KEY/attempts/0001"

    def last(path: str) -> int:
        return len(synced) - 1 - synced[::-1].index(path)

    outputs = f"{attempt}/outputs"
    files = [f"{outputs}/number/number.txt", f"{outputs}/number/deep/er/file.txt"]
    folders = [f"{outputs}/number/deep", f"{outputs}/number", outputs, attempt]
    manifest = last("store/stages/KEY")  # the folder that names the manifest
    assert manifest == len(synced) - 1
    assert "/." in synced[manifest - 1]  # and the manifest itself, under its name of before
    assert max(map(last, files + folders)) < manifest - 1

    checkpoint = f"{attempt}/checkpoints/000001"
    events = synced.index(f"{attempt}/events")
    assert synced.index(f"{checkpoint}/state.txt") < synced.index(checkpoint) < events
    assert synced.index(f"{attempt}/checkpoints") < events


@pytest.mark.parametrize("write", ["write", "create"])
def test_a_written_file_is_safe(tmp_path: Path, disk: LossyDisk, write: str) -> None:
    with disk.recording(lambda: None):
        getattr(LocalStorage(disk.root / "store"), write)("deep/folder/file", b"1")
    assert LocalStorage(disk.cut(tmp_path / "cut") / "store").read("deep/folder/file") == b"1"


# --------------------------------------------------------------------------------- faults


def test_a_disk_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = Store(str(tmp_path / "file"))
    with pytest.raises(StorageUnavailable, match=r"file/storage.json: Not a directory"):
        store.prepare()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = store.begin_attempt(KEY)
    context = Context(params=None, folder=first.folder)
    for text in ("one", "two"):
        with context.checkpoint() as folder:
            (folder / "state.txt").write_text(text)
        first.append_events([{"type": "checkpoint"}])
    (first.folder / "checkpoints/000002/state.txt").write_text("tw0")
    last = Context(params=None, folder=store.begin_attempt(KEY).folder).last_checkpoint()
    assert last is not None
    assert (last / "state.txt").read_text() == "one"


def test_what_is_left_of_an_attempt_that_was_set_aside_is_not_published(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    undead = store.begin_attempt(KEY)
    context = Context(params=None, folder=undead.folder)
    (context.output("number") / "first.txt").write_text("1")
    publish(store, "5")
    (tmp_path / f"stages/{KEY}/manifest.json").write_text("{}")
    assert store.set_aside(KEY)
    (context.output("number") / "second.txt").write_text("2")  # into a folder made anew
    with pytest.raises(FileNotFoundError, match="attempt 1 was set aside together with a damaged"):
        undead.publish({}, ["number"], {})
    assert store.manifest(KEY) is None
    publish(store, "6")
    assert not undead.publish({}, ["number"], {})
    manifest = store.manifest(KEY)
    assert manifest is not None
    assert manifest.attempt == 3


def test_names_that_are_no_numbers_are_passed_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, "5")
    (tmp_path / f"stages/{KEY}/attempts/copy of 0001").mkdir()
    (tmp_path / f"stages/{KEY}.damaged-copy").mkdir()
    store.raise_generation("b", 1)
    (tmp_path / "generations/notes.txt").write_text("")
    assert store.attempts(KEY) == [1]
    assert store.damaged(KEY) == []
    assert store.generations() == {"b": 1}
    assert json.loads((tmp_path / "storage.json").read_text())["format"] == 2


def test_what_is_killed_while_it_publishes_leaves_nothing_half_done(tmp_path: Path) -> None:
    """A few of the kill points; `tests/faults` has a thousand."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("crash_points.py")), tmp_path, "20", "99"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case for case in cases if not case["ok"]] == []
    assert (done.returncode, len(cases)) == (0, 20)


@pytest.mark.parametrize("name", ["run", "state", "tracking", "plan"])
def test_a_damaged_document_does_not_hide_the_other_runs(toy: Path, name: str) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    run_here(overrides=["start.value=2"])
    store = Store(".fls")
    first, second = store.list_runs()
    path = Path(f".fls/runs/{first}/{name}.json")
    path.write_text(path.read_text().replace("1", "7"))  # JSON still, and untrue
    code, output, errors = fls("status")
    assert code == 0
    assert second in output
    assert (f"runs/{first}/run.json is damaged" in errors) == (name == "run")
    assert fls("status", first)[0] == (1 if name == "run" else 0)
    assert fls("plan", "--why")[0] == fls("results")[0] == 0
