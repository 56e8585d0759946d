"""Only an outage is an outage: one bad cell, event or run keeps nothing else from tracking."""

import errno
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from toy_runs import fls, last_run, run_here, write_spec

from pipeline.store.checksum import lines_with_checksum
from pipeline.store.store import Store
from pipeline.tracking import TrackerName

THREE = """
    slow: {uses: slow, params: {steps: 20, delay_s: 0}}
    start: {uses: start, params: {value: 1}}
    add: {uses: add, params: {amount: 1}, inputs: {number: start}}
"""


def nobody() -> str:
    """Return the address of a server that is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def statuses(client: Any) -> dict[str, str]:
    experiment = client.get_experiment_by_name("toy").experiment_id
    runs = client.search_runs([experiment], f"tags.`fls.run` = '{last_run().run_id}'")
    return {run.data.tags.get("fls.cell", "toy"): run.info.status for run in runs}


def run_untracked(client: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run while the server is away; return the first segment of what `slow` said."""
    write_spec(THREE)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", nobody())
        code, _ = run_here(tracking=TrackerName.MLFLOW, tracking_later=True)
    assert code == 0
    key = last_run().cells["slow"].key
    return Path(f".fls/stages/{key}/attempts/0001/events/000001.jsonl")


def test_a_flipped_bit_in_the_events_of_a_cell_keeps_no_cell_from_being_recorded(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = run_untracked(client, monkeypatch)
    data = bytearray(segment.read_bytes())
    data[-5] ^= 1
    segment.write_bytes(data)
    code, output, errors = fls("sync", "last")
    assert (code, errors) == (0, ""), output
    assert set(statuses(client).values()) == {"FINISHED"}
    assert {"slow", "start", "add"} <= set(statuses(client))


@pytest.mark.parametrize(
    "event",
    [
        {"type": "metrics"},
        {"type": "metrics", "time": 1.0, "values": ["loss"], "step": 0},
        {"type": "metrics", "time": 1.0, "values": {"loss": "low"}, "step": 0},
        {"type": "metrics", "time": 1.0, "values": {"loss": 1.0}, "step": 10**30},
        {"type": "metrics", "time": "now", "values": {}, "step": None},
        {"type": "record", "time": 1.0},
        {"type": "progress", "time": 1.0},
        {"type": "text", "time": 1.0, "text": None},
        {"type": "system", "time": 1.0},
        {"type": "end", "time": None},
        {"type": ["start"]},
        {"type": "start"},
        {},
        [],
        "start",
        None,
    ],
    ids=lambda event: json.dumps(event)[:40],
)
def test_an_event_that_is_none_is_said_to_be_and_the_rest_is_read(toy: Path, event: Any) -> None:
    store = Store(".fls")
    segment = Path(".fls/stages/k/attempts/0001/events/000001.jsonl")
    segment.parent.mkdir(parents=True)
    good = {"type": "start", "time": 1.0, "run": "r", "host": "h", "pid": 1}
    segment.write_bytes(lines_with_checksum([good, event]))
    (first, said), last = store.read_events("k", 1)
    assert (first, last) == (good, 1)
    assert said["type"] == "text"
    assert "an event of attempt 1 cannot be read" in said["text"]


def test_a_cell_that_cannot_be_recorded_is_set_aside_and_named_while_the_run_goes_on(
    client: Any, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.tracking.mlflow import MLflowTracker

    log = MLflowTracker.log
    calls = []

    def broken(self: Any, cell: str, events: list[Any]) -> None:
        if cell == "slow":
            calls.append(cell)
            raise KeyError("host")
        log(self, cell, events)

    write_spec(THREE)
    with monkeypatch.context() as patch:
        patch.setattr(MLflowTracker, "log", broken)
        code, output = run_here(tracking=TrackerName.MLFLOW)
    assert code == 0
    assert output.count("slow cannot be recorded: 'host' (KeyError)") == 1
    assert "Tracking is behind" not in output
    assert f"`fls sync {last_run().run_id}" in output
    found = statuses(client)
    assert (found["start"], found["add"], found["toy"]) == ("FINISHED", "FINISHED", "FINISHED")
    assert len(calls) <= 2, "while it runs, and once it has ended"
    assert not last_run().tracked
    assert fls("sync", "last")[:2] == (0, f"{last_run().run_id} is complete: 1 cells sent.\n")
    assert set(statuses(client).values()) == {"FINISHED"}


@pytest.mark.parametrize("call", ["promote", "close_run"])
def test_an_end_that_cannot_be_recorded_is_named_and_not_tried_for_ever(
    client: Any, toy: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from pipeline.tracking.mlflow import MLflowTracker

    def broken(*arguments: Any) -> None:
        raise TypeError("no such thing")

    write_spec("""
        start: {uses: start, params: {value: 1}}
        total: {uses: total, inputs: {numbers: start}}
        report: {uses: report, inputs: {results: total}}
    """)
    monkeypatch.setattr(MLflowTracker, call, broken)
    code, output = run_here(tracking=TrackerName.MLFLOW)
    assert code == 0
    assert output.count("cannot be recorded: no such thing (TypeError)") == 1
    assert "Tracking is behind" not in output
    assert not last_run().tracked


def test_a_run_of_someone_s_own_beside_the_cells_keeps_nothing_from_being_recorded(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec(THREE)
    run_here(tracking=TrackerName.MLFLOW)
    experiment = client.get_experiment_by_name("toy").experiment_id
    parent = client.search_runs([experiment], "tags.`fls.kind` = 'pipeline'")[0]
    client.create_run(experiment, tags={"mlflow.parentRunId": parent.info.run_id})
    record = last_run()
    record.tracked = record.tracking.ended = False
    record.save_progress(Store(".fls"), leaving=True)
    code, _, errors = fls("sync", "last")
    assert (code, errors) == (0, "")


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (socket.gaierror(-2, "Name or service not known"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (KeyError("host"), False),
        (TypeError(), False),
        (UnicodeDecodeError("utf-8", b"", 0, 1, ""), False),
        (RecursionError(), False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", list(TrackerName))
def test_only_what_lies_between_is_an_outage(
    error: Exception, passes: bool, name: TrackerName
) -> None:
    from pipeline.tracking import make_tracker

    assert make_tracker(name).is_outage(error) is passes


def test_what_mlflow_makes_of_an_error_is_judged_by_the_error() -> None:
    import requests
    from mlflow.exceptions import MlflowException, RestException
    from mlflow.tracking import MlflowClient

    from pipeline.tracking.mlflow import MLflowTracker

    tracker = MLflowTracker()
    with pytest.raises(MlflowException) as away, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        MlflowClient(nobody()).get_run("0")
    assert tracker.is_outage(away.value)
    wrapped = MlflowException("in the store of a database")
    wrapped.__cause__ = KeyError("host")
    assert not tracker.is_outage(wrapped)
    assert tracker.is_outage(MlflowException("a gateway's page"))
    answers = {"TEMPORARILY_UNAVAILABLE": True, "INTERNAL_ERROR": False, "BAD_REQUEST": False}
    for code, passes in answers.items():
        assert tracker.is_outage(RestException({"error_code": code})) is passes
    response = requests.Response()
    for status, passes in {502: True, 503: True, 400: False, 403: False}.items():
        response.status_code = status
        assert tracker.is_outage(requests.HTTPError(response=response)) is passes
