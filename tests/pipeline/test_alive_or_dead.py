"""Whether a run is alive is told by one clock, however clocks and process numbers differ."""

import os
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from toy_runs import fls, last_run, run_here, write_spec

from pipeline.base.errors import StorageUnavailable, TakenOver
from pipeline.base.states import RunState
from pipeline.running.record import RunRecord
from pipeline.running.runs import load_run
from pipeline.store.checksum import verified, with_checksum
from pipeline.store.leases import has_died, this_machine
from pipeline.store.store import Store

ONE = "    start: {uses: start, params: {value: 5}}\n"
ELSEWHERE = "another-boot pid:[1]"
NOBODY = 2**22 + 1  # beyond the largest process number


@pytest.fixture
def run_id(toy: Path) -> str:
    """Return a run whose driver works on it, as its document says."""
    write_spec(ONE)
    assert run_here()[0] == 0
    run_id = last_run().run_id
    change(run_id, state="running", machine=ELSEWHERE, pid=NOBODY, heartbeat=time.time())
    return run_id


def change(run_id: str, **fields: Any) -> None:
    path = Path(".fls/runs", run_id, "state.json")
    path.write_bytes(with_checksum({**verified(path.read_bytes()), **fields}))


def beat_every(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("account", "heartbeat"):
        monkeypatch.setattr(f"pipeline.running.{module}.HEARTBEAT_S", seconds)


def be_silent(run_id: str, seconds: float = 7200) -> None:
    """Let the run's last sign of life have been written so long ago."""
    then = time.time() - seconds
    for name in ("state.json", "marks/alive"):
        if (path := Path(".fls/runs", run_id, name)).exists():
            os.utime(path, (then, then))


def load(run_id: str) -> RunRecord:
    return load_run(Store(".fls"), run_id)


SKEWS = [-86_400.0, -60.0, 0.0, 7200.0]


@pytest.mark.parametrize("skew_s", SKEWS)
def test_a_live_run_is_running_whatever_its_clock_says(run_id: str, skew_s: float) -> None:
    change(run_id, heartbeat=time.time() + skew_s)
    assert load(run_id).observed_state() is RunState.RUNNING
    assert fls("resume", run_id)[0] == 2
    assert "is running: process" in fls("resume", run_id)[2]


@pytest.mark.parametrize("skew_s", SKEWS)
def test_a_dead_run_is_interrupted_whatever_its_clock_says(run_id: str, skew_s: float) -> None:
    change(run_id, heartbeat=time.time() + skew_s)
    be_silent(run_id)
    assert load(run_id).observed_state() is RunState.INTERRUPTED
    assert fls("resume", run_id)[0] == 0


@pytest.mark.parametrize("skew_s", [-7200.0, 7200.0])
def test_the_watchers_own_clock_does_not_count(
    run_id: str, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    be_silent(run_id, 10)
    truth = time.time
    monkeypatch.setattr(time, "time", lambda: truth() + skew_s)
    assert load(run_id).observed_state() is RunState.RUNNING
    assert load(run_id).silence_s() == pytest.approx(10, abs=5)


def test_a_process_number_of_another_namespace_says_nothing(run_id: str) -> None:
    assert load(run_id).is_attended(), "no process here has its number"
    change(run_id, machine=this_machine())
    assert not load(run_id).is_attended()
    assert has_died(this_machine(), NOBODY)
    assert not has_died(ELSEWHERE, NOBODY)
    assert not has_died("", NOBODY)
    assert not has_died(this_machine(), os.getpid())


def test_a_silent_run_ages_by_the_monotonic_clock(
    run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, truth = load(run_id), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: truth() + 3600)
    assert not record.is_attended()


def test_a_storage_that_is_read_only_is_judged_by_this_clock(run_id: str) -> None:
    store = Store(".fls")

    def refuse(path: str, data: bytes) -> None:
        raise OSError("read-only file system")

    store.storage.write = refuse  # type: ignore[method-assign]
    assert store.now() == pytest.approx(time.time(), abs=5)
    assert load_run(store, run_id).is_attended()


def test_a_sync_of_all_runs_takes_over_none_that_may_go_on(run_id: str) -> None:
    path = Path(".fls/runs", run_id, "tracking.json")
    path.write_bytes(
        with_checksum({**verified(path.read_bytes()), "tracked": False, "ended": False})
    )
    be_silent(run_id)
    code, output, _ = fls("sync")
    assert code == 1
    assert f"{run_id} has not ended: process {NOBODY} on " in output
    assert f"`fls sync {run_id}` sends the rest" in output
    assert load(run_id).life == 1
    code, output, _ = fls("sync", run_id)
    assert code == 0, output
    assert "is complete" in output
    assert load(run_id).life == 2


def test_a_sync_of_all_runs_takes_over_what_is_certainly_dead(run_id: str) -> None:
    path = Path(".fls/runs", run_id, "tracking.json")
    path.write_bytes(
        with_checksum({**verified(path.read_bytes()), "tracked": False, "ended": False})
    )
    change(run_id, machine=this_machine())
    assert fls("sync")[0] == 0
    assert load(run_id).life == 2


@pytest.mark.parametrize("state", ["done", "failed", "stopped"])
def test_runs_that_are_not_recorded_yet_are_kept_and_named(run_id: str, state: str) -> None:
    path = Path(".fls/runs", run_id, "tracking.json")
    change(run_id, state=state, heartbeat=0)
    recorded = verified(path.read_bytes())
    assert recorded["destination"]
    path.write_bytes(with_checksum({**recorded, "tracked": False}))
    output = fls("gc", "--keep-runs", "0")[1]
    assert f"run {run_id} is kept: {recorded['destination']} lacks part of it" in output
    assert f"runs/{run_id}" not in output
    path.write_bytes(with_checksum(recorded))
    assert f"runs/{run_id}" in fls("gc", "--keep-runs", "0")[1]


def test_runs_that_a_process_works_for_are_kept_and_named(run_id: str) -> None:
    change(run_id, state="done", heartbeat=time.time() - 9000)
    output = fls("gc", "--keep-runs", "0")[1]
    assert f"run {run_id} is kept: process {NOBODY} on " in output
    assert f"runs/{run_id}" not in output


def test_a_driver_of_many_cells_beats_often_and_seldom_writes_them_all(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, beats = [], []
    save, beat = RunRecord.save_progress, RunRecord.beat

    def slow_save(record: RunRecord, store: Store, *, leaving: bool = False) -> None:
        saves.append(time.monotonic())
        time.sleep(0.1)  # as of thousands of cells
        save(record, store, leaving=leaving)

    def counted_beat(record: RunRecord, store: Store) -> None:
        beats.append(time.monotonic())
        beat(record, store)

    beat_every(0.1, monkeypatch)
    monkeypatch.setattr(RunRecord, "save_progress", slow_save)
    monkeypatch.setattr(RunRecord, "beat", counted_beat)
    write_spec("    slow: {uses: slow, params: {steps: 40, delay_s: 0.1}}\n")
    assert run_here()[0] == 0
    seconds = saves[-1] - saves[0]
    assert len(saves) <= 4 + seconds / 2
    assert len(beats) >= 5
    assert Path(f".fls/runs/{last_run().run_id}/marks/alive").exists()


def test_a_driver_that_waits_for_its_storage_beats_on_time(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[float] = []
    read, beat = Store.read_events, RunRecord.beat

    def slow_read(store: Store, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            time.sleep(1.5)
        return read(store, *arguments, **options)

    def noted_beat(record: RunRecord, store: Store) -> None:
        beat(record, store)
        beats.append(time.monotonic())

    beat_every(0.1, monkeypatch)
    monkeypatch.setattr(Store, "read_events", slow_read)
    monkeypatch.setattr(RunRecord, "beat", noted_beat)
    write_spec("    start: {uses: start, params: {value: 1}}\n")
    assert run_here()[0] == 0
    assert max(later - sooner for sooner, later in pairwise(beats)) < 1.0


def test_a_driver_whose_heartbeat_fails_ends(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(record: RunRecord, store: Store) -> None:
        raise StorageUnavailable("The storage is away.")

    beat_every(0.1, monkeypatch)
    monkeypatch.setattr(RunRecord, "beat", fail)
    write_spec("    slow: {uses: slow, params: {steps: 400, delay_s: 0.1}}\n")
    with pytest.raises(StorageUnavailable, match="is away.*fls resume"):
        run_here()
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_a_driver_whose_run_was_taken_over_beats_no_more(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[str] = []
    beat = RunRecord.beat

    def taken_over(record: RunRecord, store: Store) -> None:
        beats.append(record.run_id)
        beat(record, store)
        store.begin_life(record.run_id)

    beat_every(0.1, monkeypatch)
    monkeypatch.setattr(RunRecord, "beat", taken_over)
    write_spec("    slow: {uses: slow, params: {steps: 400, delay_s: 0.1}}\n")
    with pytest.raises(TakenOver, match="was taken over by another process"):
        run_here()
    assert len(beats) == 1
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_a_beat_is_a_sign_of_life(run_id: str) -> None:
    be_silent(run_id)
    assert not load(run_id).is_attended()
    load(run_id).beat(Store(".fls"))
    assert load(run_id).is_attended()
