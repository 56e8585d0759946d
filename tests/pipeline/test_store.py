"""The store's protocol, on a local folder, in memory and on S3 alike."""

import itertools
import pickle
import threading
import time
from pathlib import Path

import pytest
from s3_server import BUCKET

from pipeline.base.errors import Damaged, StorageUnsupported, StoreError
from pipeline.code.provenance import Provenance
from pipeline.planning.planner import RunPlan
from pipeline.stage import Context, StageError
from pipeline.store.attempt import Attempt
from pipeline.store.checksum import with_checksum
from pipeline.store.layout import manifest_path
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.remote import RemoteStorage
from pipeline.store.store import Store

KEY = "k" * 64
INGREDIENTS = {"stage": "toy"}
_counter = itertools.count()


@pytest.fixture(params=["folder", "memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    if request.param == "folder":
        return Store(str(tmp_path / "results"))
    if request.param == "local":  # fsspec again, but with real folders
        store = Store(str(tmp_path / "results"))
        store.storage = RemoteStorage(f"local://{tmp_path}/results")
        return store
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Store(f"s3://{BUCKET}/store-{next(_counter)}")
    return Store(f"memory://store-{next(_counter)}")


def context(attempt: Attempt) -> Context:
    return Context(params=None, folder=attempt.folder)


def publish(store: Store, text: str = "5", key: str = KEY) -> bool:
    with store.begin_attempt(key) as attempt:
        folder = context(attempt).output("number")
        (folder / "inner").mkdir()
        (folder / "inner/number.txt").write_text(text)
        (folder / "empty.txt").write_text("")
        return attempt.publish(INGREDIENTS, ["number"], {"device": "cpu"})


def output_path(attempt: int, file: str = "inner/number.txt") -> str:
    return f"stages/{KEY}/attempts/{attempt:04d}/outputs/number/{file}"


# ------------------------------------------------------------------------- publication


def test_a_published_result_can_be_fetched(store: Store) -> None:
    assert store.manifest(KEY) is None
    before = time.time()
    assert publish(store)
    manifest = store.manifest(KEY)
    assert manifest is not None
    assert (manifest.key, manifest.attempt, manifest.ingredients) == (KEY, 1, INGREDIENTS)
    assert manifest.making == {"device": "cpu"}
    assert before <= manifest.time <= time.time()
    assert manifest.outputs["number"]["inner/number.txt"] == {
        "sha256": "ef2d127de37b942baad06145e54b0c619a1f22327b2ebbcfbec78f5564afe39d",
        "bytes": 1,
    }
    folder = store.fetch(KEY, "number")
    assert (folder / "inner/number.txt").read_text() == "5"
    assert (folder / "empty.txt").read_text() == ""


def test_a_store_is_seen_by_another_process(store: Store) -> None:
    publish(store)
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - made here
    assert copy.manifest(KEY) == store.manifest(KEY)
    assert copy.prepare() == store.prepare()


def test_the_first_to_publish_wins_whatever_its_number(store: Store) -> None:
    slow, quick = store.begin_attempt(KEY), store.begin_attempt(KEY)
    assert (slow.number, quick.number) == (1, 2)
    assert slow.folder != quick.folder
    for attempt, text in ((slow, "slow"), (quick, "quick")):
        (context(attempt).output("number") / "number.txt").write_text(text)
    assert quick.publish(INGREDIENTS, ["number"], {})
    assert (store.fetch(KEY, "number") / "number.txt").read_text() == "quick"
    assert not slow.publish(INGREDIENTS, ["number"], {})
    assert (store.fetch(KEY, "number") / "number.txt").read_text() == "quick"
    manifest = store.manifest(KEY)
    assert manifest is not None
    assert manifest.attempt == 2
    assert store.storage.names(f"stages/{KEY}/attempts/0001/outputs") == []  # work discarded
    assert "published first" in (store.failure(KEY, 1) or {})["message"]


@pytest.mark.parametrize("store", ["folder", "memory", "s3"], indirect=True)
def test_many_at_once_one_wins(store: Store) -> None:
    barrier = threading.Barrier(8, timeout=20)
    won: list[tuple[bool, str]] = []

    def work(text: str) -> None:
        attempt = store.begin_attempt(KEY)
        (context(attempt).output("number") / "number.txt").write_text(text)
        barrier.wait()
        won.append((attempt.publish(INGREDIENTS, ["number"], {}), text))

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.attempts(KEY) == list(range(1, 9))
    winners = [text for first, text in won if first]
    assert len(winners) == 1
    assert (store.fetch(KEY, "number") / "number.txt").read_text() == winners[0]


def test_an_interrupted_publication_leaves_no_manifest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = store.begin_attempt(KEY)
    (context(attempt).output("number") / "number.txt").write_text("5")

    def interrupt(path: str, data: bytes) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attempt._storage, "create", interrupt)
        with pytest.raises(KeyboardInterrupt):
            attempt.publish(INGREDIENTS, ["number"], {})
    assert store.manifest(KEY) is None
    assert publish(store)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["number", "other"], "the stage wrote nothing into its output 'other'"),
        ([], "the stage wrote an output that it does not declare: 'number'"),
    ],
)
def test_outputs_must_be_those_declared(store: Store, outputs: list[str], message: str) -> None:
    attempt = store.begin_attempt(KEY)
    (context(attempt).output("number") / "number.txt").write_text("5")
    context(attempt).output("other") if "other" in outputs else None
    with pytest.raises(StageError, match=message):
        attempt.publish(INGREDIENTS, outputs, {})
    assert store.manifest(KEY) is None


def test_what_is_not_there_cannot_be_fetched(store: Store) -> None:
    with pytest.raises(StoreError, match="has no output 'number'"):
        store.fetch(KEY, "number")
    publish(store)
    with pytest.raises(StoreError, match="has no output 'nmber'"):
        store.fetch(KEY, "nmber")


# ------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_output_is_noticed_and_set_aside(store: Store, damage: str) -> None:
    publish(store)
    publish(store, key="other")
    fresh = Store(store.url)
    path = output_path(1)
    if damage == "changed":
        fresh.storage.write(path, b"6")
    else:
        fresh.storage.remove(path.rpartition("/")[0])
    with pytest.raises(Damaged, match=r"number/inner/number.txt (differs|is missing)") as raised:
        fresh.fetch(KEY, "number")
    assert raised.value.key == KEY
    assert fresh.set_aside(KEY)
    assert fresh.damaged(KEY) == [1]
    assert fresh.manifest(KEY) is None
    assert not fresh.set_aside(KEY)
    assert publish(fresh)
    manifest = fresh.manifest(KEY)
    assert manifest is not None
    assert manifest.attempt == 2  # numbers are never used twice
    assert not fresh.set_aside(KEY)  # made anew, and whole
    fresh.storage.write(output_path(2), b"7")
    assert fresh.set_aside(KEY)
    assert fresh.damaged(KEY) == [1, 2]


def test_a_manifest_that_cannot_be_read_is_set_aside_by_the_next_attempt(store: Store) -> None:
    publish(store)
    store.storage.write(f"stages/{KEY}/manifest.json", b'{"key":')
    with pytest.raises(Damaged, match="its manifest cannot be read"):
        store.manifest(KEY)
    assert publish(store)
    assert store.damaged(KEY) == [1]


def test_a_damaged_copy_of_a_whole_remote_result_is_fetched_again(tmp_path: Path) -> None:
    store = Store(f"memory://store-{next(_counter)}")
    publish(store)
    copy = store.fetch(KEY, "number") / "inner/number.txt"
    copy.write_text("6")
    assert (store.fetch(KEY, "number") / "inner/number.txt").read_text() == "5"


# -------------------------------------------------------------------- in-stage checkpoints


def checkpoint(attempt: Attempt, text: str) -> None:
    events: list[dict[str, object]] = []
    ctx = Context(params=None, folder=attempt.folder, emit=events.append)
    with ctx.checkpoint() as folder:
        (folder / "state.txt").write_text(text)
    attempt.append_events(events)


def checkpoint_text(attempt: Attempt) -> str | None:
    last = context(attempt).last_checkpoint()
    return (last / "state.txt").read_text() if last else None


def test_the_next_attempt_goes_on_from_the_newest_checkpoint(store: Store) -> None:
    first = store.begin_attempt(KEY)
    assert checkpoint_text(first) is None
    for text in ("one", "two", "three"):
        checkpoint(first, text)
    second = store.begin_attempt(KEY)  # the first was killed
    assert checkpoint_text(second) == "three"
    third = store.begin_attempt(KEY)  # the second was killed before a checkpoint of its own
    assert checkpoint_text(third) == "three"
    checkpoint(third, "four")
    assert checkpoint_text(first) == "three"  # what one attempt does never touches another's
    with store.begin_attempt(KEY) as fourth:
        assert checkpoint_text(fourth) == "four"
        (context(fourth).output("number") / "number.txt").write_text("5")
        assert fourth.publish(INGREDIENTS, ["number"], {})
    for number in range(1, 5):
        assert store.storage.names(f"stages/{KEY}/attempts/{number:04d}/checkpoints") == []


def test_a_checkpoint_in_the_making_is_not_taken_over(store: Store) -> None:
    first = store.begin_attempt(KEY)
    checkpoint(first, "whole")
    part = first.folder / "checkpoints/000002.part"
    part.mkdir()
    (part / "state.txt").write_text("half")
    first.append_events([{"type": "checkpoint", "number": 2}])
    assert checkpoint_text(store.begin_attempt(KEY)) == "whole"


def test_a_checkpoint_half_uploaded_is_not_taken_over() -> None:
    store = Store(f"memory://store-{next(_counter)}")
    first = store.begin_attempt(KEY)
    checkpoint(first, "whole")
    store.storage.write(f"stages/{KEY}/attempts/0001/checkpoints/000002/state.txt", b"half")
    assert checkpoint_text(store.begin_attempt(KEY)) == "whole"


def test_a_checkpoint_that_vanishes_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    first = store.begin_attempt(KEY)
    checkpoint(first, "old")
    checkpoint(first, "new")
    load = LocalStorage.load

    def vanish(self: LocalStorage, path: str, folder: Path) -> None:
        if path.endswith("000002"):
            raise FileNotFoundError(path)
        load(self, path, folder)

    monkeypatch.setattr(LocalStorage, "load", vanish)
    assert checkpoint_text(store.begin_attempt(KEY)) == "old"


# ------------------------------------------------------------------- events, runs, generations


def test_events_are_read_as_they_come(store: Store) -> None:
    attempt = store.begin_attempt(KEY)
    assert store.read_events(KEY, 1) == ([], 0)
    attempt.append_events([{"type": "a"}, {"type": "b", "text": "zwei\nZeilen é"}])
    attempt.append_events([])
    attempt.append_events([{"type": "c", "value": 1e-3}])
    events, last = store.read_events(KEY, 1)
    assert [event["type"] for event in events] == ["a", "b", "c"]
    assert events[1]["text"] == "zwei\nZeilen é"
    assert last == 2
    assert store.read_events(KEY, 1, after=1) == ([{"type": "c", "value": 1e-3}], 2)
    assert store.read_events(KEY, 1, after=2) == ([], 2)


def test_a_failure_is_recorded_and_a_scratch_folder_deleted(store: Store) -> None:
    with store.begin_attempt(KEY) as attempt:
        attempt.fail({"message": "no", "user": True})
    assert store.failure(KEY, 1) == {"message": "no", "user": True}
    assert store.failure(KEY, 2) is None
    assert attempt.folder.exists() == isinstance(store.storage, LocalStorage)


def test_documents_of_runs(store: Store) -> None:
    assert store.list_runs() == []
    for run in ("20260102-1", "20260101-1"):
        store.write_run(run, RunPlan(pipeline="one", cells={}))
    store.write_run("20260101-1", RunPlan(pipeline="two", cells={}))
    assert store.list_runs() == ["20260101-1", "20260102-1"]
    assert store.read_run("20260101-1", RunPlan) == RunPlan(pipeline="two", cells={})
    assert store.read_run("20260101-1", Provenance) is None


def test_a_mark_on_a_run_is_new_once(store: Store) -> None:
    """Nobody takes another's mark for its own whose answer got lost."""
    assert store.mark_run("run", "stop-1")
    assert not store.mark_run("run", "stop-1")
    assert [store.begin_life("run") for _ in range(3)] == [1, 2, 3]
    assert store.run_marks("run") == ["life-1", "life-2", "life-3", "stop-1"]


def test_generations(store: Store) -> None:
    assert store.generations() == {}
    store.raise_generation("b", 1)
    store.raise_generation("b", 1)
    store.raise_generation("b", 10)
    store.raise_generation("c", 2)
    assert store.generations() == {"b": 10, "c": 2}


# ------------------------------------------------------------------------------ the storage


def test_reading_makes_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "results"))
    assert store.manifest(KEY) is None
    assert store.list_runs() == store.attempts(KEY) == []
    assert not store.set_aside(KEY)
    assert not (tmp_path / "results").exists()


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    publish(Store(f"file://{tmp_path}/results"))
    assert Store(str(tmp_path / "results")).manifest(KEY) is not None


def test_local_work_is_done_in_place(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store)
    assert store.fetch(KEY, "number").is_relative_to(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".gitignore",
        "stages",
        "storage.json",
    ]


def test_a_file_system_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(StorageUnsupported, match="no hard links .*put 'storage:' on another one"):
        Store(str(tmp_path)).begin_attempt(KEY)


@pytest.mark.parametrize("how", ["ignored", "unknown"])
def test_a_remote_storage_without_exclusive_creation_is_refused(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store = Store(f"memory://store-{next(_counter)}")

    def create(self: RemoteStorage, path: str, data: bytes) -> bool:
        if how == "unknown":
            raise ValueError("unsupported file mode 'xb'")
        return True

    monkeypatch.setattr(RemoteStorage, "create", create)
    with pytest.raises(StorageUnsupported, match="exclusively|conditional writes"):
        store.begin_attempt(KEY)


def test_storage_of_another_version_is_refused(store: Store) -> None:
    store.storage.write("storage.json", with_checksum({"format": 99, "token": ""}))
    with pytest.raises(StoreError, match="layout of version 99, of a later fls"):
        store.begin_attempt(KEY)


# ------------------------------------------------------------------------------- all files


def test_all_files_are_listed_with_their_sizes_and_times(store: Store) -> None:
    before = time.time()
    publish(store)
    store.storage.write(f"stages/{KEY}/.hidden", b"123")
    files = {file.path: file for file in store.storage.files("stages")}
    assert list(files) == sorted(files)
    assert files[f"stages/{KEY}/.hidden"].bytes == 3
    assert files[output_path(1)].bytes == 1
    assert all(before - 1 <= file.time <= time.time() + 1 for file in files.values())
    (one,) = store.storage.files(output_path(1))
    assert one == files[output_path(1)]
    assert store.storage.files("nowhere") == []
    assert "storage.json" in {file.path for file in store.storage.files("")}


def test_a_file_is_opened_and_removed_alone(store: Store) -> None:
    publish(store)
    with store.storage.open(output_path(1)) as file:
        assert (file.read(10), file.read(10)) == (b"5", b"")
    store.storage.remove(output_path(1))
    store.storage.remove(output_path(1))
    assert store.storage.files(output_path(1)) == []
    with pytest.raises(FileNotFoundError):
        store.storage.open(output_path(1))
    store.storage.remove(f"stages/{KEY}")
    assert store.storage.files("stages") == []


def test_a_damaged_result_is_not_made_though_its_earlier_files_were_collected(
    store: Store,
) -> None:
    publish(store)
    manifest = store.manifest(KEY)
    assert manifest is not None
    store.collect(manifest)
    assert store.made(KEY) == manifest
    store.storage.write(manifest_path(KEY), b"{")
    assert store.readable(KEY) is None
    assert store.made(KEY) is None
