"""What is collected of a store, and above all what is not."""

import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from toy_runs import (
    DIAMOND,
    checkpoint_exists,
    fls,
    kill,
    last_run,
    numbers,
    ran,
    resume_here,
    run_here,
    start_fls,
    wait_for,
    write_spec,
)

from pipeline.base.errors import StoreError
from pipeline.base.secrets import presentable
from pipeline.planning.planner import Plan, Selection, make_plan
from pipeline.running import launch
from pipeline.spec.load import load_spec
from pipeline.stage import Context, write_json
from pipeline.store.attempt import whole_checkpoints
from pipeline.store.checksum import verified, with_checksum
from pipeline.store.store import Store
from pipeline.upkeep.gc import Garbage, collect, find_garbage
from pipeline.upkeep.survey import Retention

_counter = itertools.count()


def age(folder: str | Path = ".fls", seconds: float = 7200.0) -> None:
    """Let all files in a folder have been written that long ago."""
    then = time.time() - seconds
    for path in Path(folder).rglob("*"):
        os.utime(path, (then, then), follow_symlinks=False)


def find(**limits: float | None) -> dict[str, str]:
    """Return path -> reason of what is not needed, with `pipeline.yaml` as it is."""
    found = find_garbage(Store(".fls"), [plan()], Retention(**limits))  # type: ignore[arg-type]
    return {item.paths[-1]: item.reason for item in found}


def plan() -> Plan:
    spec = load_spec(Path("pipeline.yaml"))
    return make_plan(spec, Store(spec.storage))


def key_of(cell: str) -> str:
    return last_run().cells[cell].key


def manifests() -> set[str]:
    return {path.parent.name for path in Path(".fls/stages").glob("*/manifest.json")}


# ------------------------------------------------------------------------------ what stays


def test_nothing_of_kept_runs_is_garbage(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    run_here(overrides=["start.value=20"])
    age()
    assert find() == {}
    code, output, errors = fls("gc", "--apply")
    assert (code, errors) == (0, "")
    assert len(manifests()) == 16


@pytest.mark.parametrize("apply", [[], ["--apply"]])
def test_what_only_the_grace_period_spares_is_said(toy: Path, apply: list[str]) -> None:
    write_spec(DIAMOND)
    run_here()
    run_here(overrides=["start.value=20"])
    output = fls("gc", "--keep-runs", "0", *apply)[1]
    assert len(manifests()) == 16
    assert re.search(
        r"^Kept, though unneeded, because written to within the grace period of 1h \(--grace\): "
        r"8 items, [\d.]+ kB\.$",
        output,
        re.MULTILINE,
    )
    assert apply or "All 2 runs are kept, with their results" in fls("gc")[1]
    age()
    assert "grace period" not in fls("gc", "--keep-runs", "0", *apply)[1]
    assert len(manifests()) == (8 if apply else 16)


def test_dropped_runs_take_along_what_they_alone_reach(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    first = last_run()
    run_here(overrides=["add.amount=[2, 3]"])
    age()
    # The file's plan is the first run's, so only what is the second's alone goes with it.
    gone = {key_of("add[amount=3,seed=0]"), key_of("add[amount=3,seed=1]")} | {
        key_of("total"),
        key_of("report"),
    }
    assert find(keep_runs=2) == {}
    code, output, _ = fls("gc", "--keep-runs", "0")
    assert "add[amount=3,seed=0]): no kept run or plan reaches it" in output
    assert "--apply deletes them" in output
    assert len(manifests()) == 12
    size = sum(path.stat().st_size for path in Path(".fls").rglob("*") if path.is_file())
    _, output, _ = fls("gc", "--keep-runs", "0", "--apply")
    assert manifests() == {status.key for status in first.cells.values()}
    assert not gone & manifests()
    assert Store(".fls").list_runs() == []
    after = sum(path.stat().st_size for path in Path(".fls").rglob("*") if path.is_file())
    assert after < size
    before = ran()
    run_here()
    assert ran() == before, "what the file reaches was kept"


def test_all_limits_must_drop_a_run(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    for value in (1, 2, 3):
        run_here(overrides=[f"start.value={value}"])
    age()
    runs = Store(".fls").list_runs()
    path = Path(f".fls/runs/{runs[0]}/run.json")
    request = verified(path.read_bytes())
    path.write_bytes(with_checksum({**request, "began": time.time() - 40 * 86400}))
    age()
    month = 30 * 86400.0
    assert find(older_than_s=month)[f"runs/{runs[0]}"].startswith("a run of 40.0 days ago")
    assert find(older_than_s=month, keep_runs=3) == {}
    assert {path for path in find(keep_runs=1) if path.startswith("runs/")} == {
        f"runs/{run}" for run in runs[:2]
    }


def test_what_was_just_written_is_left_alone(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here(overrides=["start.value=2"])
    key = key_of("start")
    assert f"stages/{key}" not in find(keep_runs=0)
    age(seconds=1800)
    assert f"stages/{key}" not in find(keep_runs=0)
    assert find(keep_runs=0, grace_s=900)[f"stages/{key}"] == "no kept run or plan reaches it"


def test_a_live_run_keeps_everything_of_its_cells(toy: Path) -> None:
    write_spec("slow: {uses: slow, params: {steps: 400, delay_s: 0.05}}")
    process = start_fls("run", "--executor", "local", "--tracking", "jsonl")
    try:
        wait_for(checkpoint_exists)
        path = write_spec("start: {uses: start, params: {value: 1}}")
        age(".fls/stages")  # as if it had long been silent
        assert path.exists()
        key = key_of("slow")
        before = sorted(Path(f".fls/stages/{key}/attempts/0001/checkpoints").iterdir())
        assert [path for path in find(keep_runs=0) if "/" in path] == []
        fls("gc", "--keep-runs", "0", "--apply")
        assert before[-1].exists()
    finally:
        kill(process)
    # Nor does a run that may have been stopped for a moment lose anything.
    age(".fls/stages")
    assert find(keep_runs=0) == {}


# ----------------------------------------------------------------------------- what goes


def test_a_killed_run_goes_on_from_its_checkpoint_after_a_collection(toy: Path) -> None:
    write_spec("slow: {uses: slow, params: {steps: 60, delay_s: 0.05}}")
    process = start_fls("run", "--executor", "local", "--tracking", "jsonl")
    wait_for(
        lambda: (
            len(list(Path(".fls").glob("stages/*/attempts/*/checkpoints/00*[0-9]/.digests.json")))
            > 1
        )
    )
    kill(process)
    folder = Path(f".fls/stages/{key_of('slow')}/attempts/0001")
    for half in folder.rglob("." + "?" * 32):  # of a write that was killed; there is one below
        half.unlink()
    (folder / "outputs/number").mkdir(parents=True)
    (folder / "outputs/number/number.json").write_text("{")
    (folder / "checkpoints/000099.part").mkdir()
    (folder / "checkpoints/000099.part/state.json").write_text("{")
    stray = folder / ("." + "0a" * 16)
    stray.write_text("half")
    age()
    root = folder.relative_to(".fls")
    strays = {f"{root}/{stray.name}": "left by a write or a deletion that was killed"}
    os.utime(f".fls/runs/{last_run().run_id}/state.json")
    assert find() == strays, "the run may yet be alive: its last word is young"
    age()
    assert find() == {
        f"{root}/outputs": "its attempt has ended",
        f"{root}/checkpoints/000099.part": "there is a newer checkpoint",
        **strays,
    }
    fls("gc", "--apply")
    assert not stray.exists()
    assert not (folder / "outputs").exists()
    assert resume_here(last_run())[0] == 0
    texts = [
        event["text"]
        for event in Store(".fls").read_events(key_of("slow"), 2)[0]
        if event["type"] == "text"
    ]
    assert texts[0].startswith("goes on from step")


@pytest.mark.parametrize("storage", ["folder", "memory"])
def test_only_checkpoints_that_no_attempt_would_take_go(toy: Path, storage: str) -> None:
    """Two attempts left three checkpoints; the newest two are what a third may go on from."""
    url = ".fls" if storage == "folder" else f"memory://gc-{next(_counter)}"
    store = Store(url)
    write_spec("slow: {uses: slow, params: {steps: 5, delay_s: 0}}", storage=url)
    key = plan().cells[0].key
    for number in (1, 2):
        with store.begin_attempt(key) as attempt:
            context = Context(params=None, folder=attempt.folder)
            with context.checkpoint() as folder:
                write_json(folder / "state.json", {"step": number})
            attempt.append_events([{"type": "checkpoint"}])
            attempt.fail({"message": "on purpose"})
    whole = whole_checkpoints(store.storage, key, 2)
    assert whole[-1].endswith("/000002")
    found = find_garbage(store, [plan()], Retention(grace_s=0))
    wanted = [f"stages/{key}/attempts/0001/checkpoints/000001"] if len(whole) == 2 else []
    assert [item.paths[-1] for item in found] == wanted
    list(collect(store, [plan()], Retention(grace_s=0), found))
    with store.begin_attempt(key) as attempt:
        last = Context(params=None, folder=attempt.folder).last_checkpoint()
        assert last is not None
        assert json.loads((last / "state.json").read_text()) == {"step": 2}


def test_a_result_set_aside_goes_once_it_is_made_anew(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    key, store = key_of("start"), Store(".fls")
    (store.fetch(key, "number") / "number.json").write_text("{}")
    assert store.set_aside(key)
    age()
    aside = f"stages/{key}.damaged-1"
    assert find() == {f"{aside}/attempts/0001/outputs": "set aside as damaged"}
    fls("gc", "--apply")
    run_here()
    assert Store(".fls").attempts(key) == [2], "no number is used twice"
    age()
    assert find() == {aside: "set aside as damaged, and computed again since"}


def test_generations_go_that_no_cell_has(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    for _ in range(2):
        run_here(selection=Selection(force=["start"]))
    run_here(overrides=["start.value=2"], selection=Selection(force=["start"]))
    (older, newer), other = (
        sorted(Path(".fls/generations").glob(f"{name}.*"))
        for name in sorted(
            {path.name.partition(".")[0] for path in Path(".fls/generations").iterdir()},
            key=lambda base: -len(list(Path(".fls/generations").glob(f"{base}.*"))),
        )
    )
    age()
    assert find() == {f"generations/{older.name}": "was forced again since"}
    found = find(keep_runs=0)
    assert found[f"generations/{other[0].name}"] == "no cell that was forced is left"
    assert f"generations/{newer.name}" not in found
    fls("gc", "--keep-runs", "0", "--apply")
    assert [path.name for path in Path(".fls/generations").iterdir()] == [newer.name]
    assert plan().cells[0].state == "cached"


def test_a_run_killed_before_it_began_is_collected_and_shown_by_none(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    plan().commit(Store(".fls"), "20260101-000000-000-aaaa")
    assert fls("status")[0] == 0
    assert find() == {}
    age()
    assert find() == {"runs/20260101-000000-000-aaaa": "a run that was killed before it began"}


def test_without_knowing_what_a_run_needs_nothing_is_deleted(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    for name in ("plan", "run"):
        path = Path(f".fls/runs/{last_run().run_id}/{name}.json")
        text = path.read_text()
        path.write_text("{")
        age()
        with pytest.raises(StoreError, match="the needs of run .* are unknown"):
            find()
        assert fls("status")[0] == 0
        path.write_text(text)
    assert find() == {}


# ------------------------------------------------------------------- a run that starts meanwhile


def test_what_a_run_plans_meanwhile_is_spared(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here(overrides=["start.value=20"])
    run_here()
    age()
    limits = Retention(keep_runs=1)
    store = Store(".fls")
    found = find_garbage(store, [plan()], limits)
    assert len(found) == 9  # a run and its eight results
    deleting = collect(store, [plan()], limits, found)
    assert next(deleting).paths == found[0].paths
    assert found[0].paths[0].startswith("runs/")
    run_here(overrides=["start.value=20", "start.seed=[0]", "add.seed=[0]"])
    deleted = {item.paths[-1] for item in deleting}
    spared = {f"stages/{key_of(cell)}" for cell in ("start[seed=0]", "add[amount=1,seed=0]")}
    assert not spared & deleted
    assert len(deleted) == 5
    assert numbers()["start[seed=0]"] == 20


def test_what_is_written_to_meanwhile_is_spared(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    run_here(overrides=["start.value=2"])
    key, store = key_of("start"), Store(".fls")
    age()
    limits = Retention(keep_runs=0)
    found = [item for item in find_garbage(store, [plan()], limits) if key in item.paths[-1]]
    assert len(found) == 1
    deleting = collect(store, [plan()], limits, [_first(found), *found])
    next(deleting)
    with store.begin_attempt(key):
        assert list(deleting) == []


def _first(found: list[Garbage]) -> Garbage:
    """Return another thing to delete first, so that the second look comes after it."""
    store = Store(".fls")
    every = find_garbage(store, [plan()], Retention(keep_runs=0))
    return next(item for item in every if item not in found)


def test_a_run_that_finds_results_gone_makes_them_anew(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment that no second look closes: planned before the deletion, run after it."""
    write_spec(DIAMOND)
    run_here()
    store = Store(".fls")
    gone = [key_of("total"), key_of("report"), key_of("start[seed=0]")]
    for key in gone[:2]:
        store.storage.remove(f"stages/{key}")
    execute = launch._execute

    def execute_later(*given: Any) -> int:
        store.storage.remove(f"stages/{gone[2]}")
        return execute(*given)

    monkeypatch.setattr(launch, "_execute", execute_later)
    assert run_here()[0] == 0
    assert set(gone) <= manifests()


# ---------------------------------------------------------------------------- what is not ours


def test_planted_names_are_passed_over_and_the_rest_goes(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    run_here(overrides=["start.value=2"], selection=Selection(force=["start"]))
    kept, gone, run = plan().cells[0], key_of("start"), last_run().run_id
    base = Path(next(Path(".fls/generations").iterdir())).name.partition(".")[0]
    planted = [
        "runs/..x/run.json",
        "runs/\x1b[2J/run.json",
        "runs/notes",
        "generations/x",
        f"generations/{base}.",
        f"generations/{base}.\u00b2",
        "stages/a.b/manifest.json",
        "stages/\u202egnp/manifest.json",
        f"stages/{kept.key}/attempts/notes/outputs/x",
        f"stages/{kept.key}/attempts/\u00b2/checkpoints/x/y",
        f"stages/{kept.key}/attempts/0001/checkpoints/\x1b/y",
    ]
    for name in planted:
        path = Path(".fls", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    link = Path(f".fls/stages/{gone}/manifest.json")
    link.unlink()
    Path("outside").write_text("{}")
    link.symlink_to(Path("outside").absolute())
    age(".fls")
    code, output, errors = fls("gc", "--keep-runs", "0", "--apply")
    assert (code, errors) == (0, "")
    assert output.count(": no name that a store gives\n") == len(planted)
    assert all(f"passed over: {presentable(name)}: no name" in output for name in planted)
    assert all(Path(".fls", name).exists() for name in planted)
    assert "manifest.json leads out of the storage by a symbolic link" in output
    assert not Path(f".fls/runs/{run}").exists(), "what is ours goes"
    assert plan().cells[0].state == "cached"


# ------------------------------------------------------------------------------- where


def test_remote_storage_is_collected_alike(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    run_here(overrides=["start.value=20"], selection=Selection(force=["start"]))
    url = f"memory://gc-{next(_counter)}"
    store = Store(url)
    for file in Store(".fls").storage.files(""):
        store.storage.write(file.path, Path(".fls", file.path).read_bytes())
    limits = Retention(keep_runs=0, grace_s=0)
    found = find_garbage(store, [plan()], limits)
    assert len(found) == 2 + 8 + 2
    assert len(list(collect(store, [plan()], limits, found))) == 12
    left = store.storage.files("")
    age()
    fls("gc", "--apply", "--keep-runs", "0")
    here = Store(".fls").storage.files("")
    assert [(file.path, file.bytes) for file in left] == [(file.path, file.bytes) for file in here]
    assert find_garbage(store, [plan()], limits) == []


def test_gc_by_url_alone_and_with_several_storages(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    age()
    code, output, _ = fls("gc", "--storage", ".fls", "--keep-runs", "0")
    assert code == 0
    assert f"stages/{key_of('start')} (start): no kept run or plan reaches it" in output
    Path("pipeline.yaml").rename("one.yaml")
    write_spec("start: {uses: start, params: {value: 1}}", storage="other")
    code, _, errors = fls("gc", "one.yaml", "pipeline.yaml")
    assert (code, "several storages" in errors) == (2, True)
