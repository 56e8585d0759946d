"""What stages may call their values, and what MLflow has of them."""

import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runs import fls, last_run, run_here, write_spec

from pipeline.base.states import CellState
from pipeline.stage import Context
from pipeline.tracking import CellEnd, CellFacts, RunFacts, TrackerName
from pipeline.tracking.mlflow_names import Fitting, fit_label, fit_name, fit_path, fits

NAMES = [
    "acc@1",
    "acc#1",
    "layers[0].weight",
    "a/../b",
    "a//b",
    "a/",
    "/a",
    "./a",
    ".",
    "..",
    "..a",
    "//",
    "",
    "\n",
    "loss\n",
    "größe²",
    "学习率",
    "Straße",
    "a\0b",
    "half \ud800",
    "tab\there",
    "x" * 250,
    "x" * 251,
    "x" * 9000,
    "fls.name.acc@1",
]
EQUAL_TO_SOME_DATABASES = ["Acc", "acc", "ACC", "äcc", "acc "]
TELL = """
    tell:
      uses: tell
      params:
        metrics: {"acc@1": 0.5, "acc@5": 0.75, loss: 1.5}
        steps: {"train/acc@1": [0.25, 0.375]}
        options: {"layers[0].weight": 3, plain: 1}
"""


def open_tracker(client: Any, **facts: Any) -> Any:
    """Return a tracker of the run `r`, whose cell `c` is running."""
    from pipeline.tracking.mlflow import MLflowTracker

    tracker = MLflowTracker()
    run = {"run_id": "r", "name": "toy", "experiment": "toy", "uri": client.tracking_uri}
    tracker.open_run(RunFacts(**{**run, "spec_file": "f.yaml", "spec_text": "", **facts}))
    tracker.open_cell(CellFacts(cell="c", stage="c", key="k"))
    return tracker


def runs_of(client: Any, kind: str) -> list[Any]:
    experiment = client.get_experiment_by_name("toy").experiment_id
    return list(client.search_runs([experiment], f"tags.`fls.kind` = '{kind}'"))


def told_of(client: Any, run: Any, name: str) -> float:
    """Return the value of a metric by what it was called."""
    return run.data.metrics[stored_name(client, run, name)]


def stored_name(client: Any, run: Any, original: str) -> str:
    """Return what a name is in MLflow: itself, or the one whose tag says so."""
    for tag, text in run.data.tags.items():
        if tag.startswith("fls.name."):
            found = re.fullmatch(r"see the artifact (\S+)", text)
            text = artifact(run, found[1]) if found else text
            if text in {original, json.dumps(original)}:
                return tag.removeprefix("fls.name.")
    return original


def artifact(run: Any, path: str) -> str:
    return (Path(run.info.artifact_uri.removeprefix("file://")) / path).read_text()


def metrics_event(values: dict[str, float], step: int | None = None) -> dict[str, Any]:
    return {"type": "metrics", "time": 1.0, "step": step, "values": values}


def test_a_metric_of_any_name_is_recorded_and_what_was_changed_is_said_once(client: Any) -> None:
    write_spec(TELL)
    code, output = run_here(tracking=TrackerName.MLFLOW)
    assert (code, last_run().tracked) == (0, True)
    (run,), (record,) = runs_of(client, "stage"), runs_of(client, "evaluation")
    assert run.info.status == record.info.status == "FINISHED"
    for one in (run, record):
        assert told_of(client, one, "acc@1") == 0.5
        assert told_of(client, one, "acc@5") == 0.75
        assert one.data.metrics["loss"] == 1.5
    series = client.get_metric_history(run.info.run_id, stored_name(client, run, "train/acc@1"))
    assert [(point.step, point.value) for point in series] == [(0, 0.25), (1, 0.375)]
    assert record.data.params[stored_name(client, record, "layers[0].weight")] == "3"
    assert record.data.params["plain"] == "1"
    assert record.data.tags["fls.record"] == "what@it/../told"
    assert output.count("MLflow takes no metric called 'acc@1'") == 1
    assert f"recorded as '{stored_name(client, run, 'acc@1')}'" in output
    assert fls("sync", "last")[:2] == (0, f"{last_run().run_id} is complete.\n")


def test_json_lines_keep_every_name_as_it_is(toy: Path) -> None:
    write_spec(TELL)
    assert run_here()[0] == 0
    lines = Path(f"tracking/{last_run().run_id}.jsonl").read_text().splitlines()
    values = [line["values"] for line in map(json.loads, lines) if line["type"] == "metrics"]
    assert {"acc@1": 0.5, "acc@5": 0.75, "loss": 1.5} in values


def test_no_two_names_become_one_and_none_is_lost(client: Any) -> None:
    tracker = open_tracker(client)
    names = [*NAMES, *EQUAL_TO_SOME_DATABASES]
    values = {name: float(place) for place, name in enumerate(names)}
    tracker.log("c", [metrics_event(values, step=1)])
    params = {"deep": dict.fromkeys(names, 1), "deep.acc@1": 2, "a": {"b": 1}, "a.b": 2}
    record = {"type": "record", "time": 1.0, "name": "x" * 300, "params": params}
    tracker.log("c", [{**record, "metrics": values}])
    tracker.close_cell("c", CellEnd(state=CellState.DONE))
    (run,), (told,) = runs_of(client, "stage"), runs_of(client, "evaluation")
    for one in (run, told):
        assert len(one.data.metrics) == len(names)
        assert {name: told_of(client, one, name) for name in names} == values
        folded = {name.casefold().rstrip() for name in one.data.metrics}
        assert len(folded) == len(names)
    assert len(told.data.params) == len(names) + 3
    assert told.data.params["a.b"] == "1"
    assert told.data.params[stored_name(client, told, '"a.b"')] == "2"
    assert len(told.info.run_name) == 250
    assert told.data.tags["fls.record"] == "x" * 300


def test_a_later_life_calls_everything_the_same_and_says_nothing_again(client: Any) -> None:
    first = open_tracker(client)
    values = dict.fromkeys(["acc@1", "Acc", "acc"], 1.0)
    first.log("c", [metrics_event(values, step=1)])
    assert len(first.notices) == 2
    again = open_tracker(client, resumed=True)
    again.log("c", [metrics_event({"acc": 2.0, "acc@1": 2.0, "Acc": 2.0}, step=2)])
    assert not again.notices
    (run,) = runs_of(client, "stage")
    assert len(run.data.metrics) == 3
    for name in values:
        found = client.get_metric_history(run.info.run_id, stored_name(client, run, name))
        assert [point.step for point in found] == [1, 2]


def test_values_beyond_mlflow_are_cut_or_clipped_and_kept_whole(client: Any) -> None:
    long, longer = "中" * 7000, "é" * 20_000
    tracker = open_tracker(client, tags={"fls.note": longer})
    tracker.open_cell(
        CellFacts(cell="d", stage="d", key="k", params={"long": long, "longer": longer, "n": "a\0"})
    )
    events: list[Any] = []
    Context(params=None, folder=Path(), emit=events.append).log(
        {"over": 10**400, "under": -(10**400), "none": math.nan, "fine": 10**300}, step=2**70
    )
    tracker.log("d", events)
    (run,) = [one for one in runs_of(client, "stage") if one.info.run_name == "d"]
    params, tags = run.data.params, run.data.tags
    assert (params["long"], params["longer"]) == (long[:6000], longer[:6000])
    assert (params["n"], tags["fls.value.n"]) == ("a\\x00", '"a\\u0000"')
    assert tags["fls.value.long"] == long
    assert artifact(run, tags["fls.value.longer"].rpartition(" ")[2]) == longer
    assert tags["fls.note"] == longer[:8000]
    assert artifact(run, tags["fls.value.fls.note"].rpartition(" ")[2]) == longer
    largest = sys.float_info.max
    metrics = run.data.metrics
    assert (metrics["over"], metrics["under"], metrics["fine"]) == (largest, -largest, 1e300)
    assert math.isnan(metrics["none"])
    assert tags["fls.value.over"] == f"inf at step {2**70}"
    assert [text for text in tracker.notices if "no infinite numbers" in text and "'over'" in text]
    assert [text for text in tracker.notices if "6,000 of the 7,000 characters" in text]


def test_an_infinite_record_is_not_recorded_again_and_again(client: Any) -> None:
    tracker = open_tracker(client)
    event = {"type": "record", "time": 1.0, "name": "m", "params": {}, "metrics": {"nll": math.inf}}
    tracker.log("c", [event])
    (before,) = runs_of(client, "evaluation")
    open_tracker(client, resumed=True).log("c", [event])
    assert [run.info.run_id for run in runs_of(client, "evaluation")] == [before.info.run_id]


def test_what_a_server_refuses_all_the_same_holds_back_nothing_else(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one on Windows, which takes no colons in names."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    log_batch = type(client).log_batch
    calls = itertools.count()

    def strict(self: Any, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        next(calls)
        if any(":" in entry.key for entry in [*metrics, *params, *tags]):
            raise MlflowException("no colons", INVALID_PARAMETER_VALUE)
        log_batch(self, run_id, metrics, params, tags)

    monkeypatch.setattr("mlflow.tracking.MlflowClient.log_batch", strict)
    tracker = open_tracker(client)
    values = {f"m{number}": float(number) for number in range(100)}
    tracker.log("c", [metrics_event({**values, "a:b": 7.0, "c": 8.0}, step=1)])
    (run,) = runs_of(client, "stage")
    assert run.data.metrics == {**values, "c": 8.0}
    kept = [text for tag, text in run.data.tags.items() if tag.startswith("fls.refused.")]
    assert kept == ["metric a:b: 7.0"]
    assert len([text for text in tracker.notices if "refuses the metric 'a:b'" in text]) == 1
    assert next(calls) < 25


def test_a_call_holds_no_more_than_mlflow_takes(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.utils import validation

    sizes = []
    log_batch = type(client).log_batch

    def measured(self: Any, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        validation._validate_batch_log_limits(metrics, params, tags)
        text = json.dumps([(entry.key, entry.value) for entry in [*metrics, *params, *tags]])
        sizes.append(len(text))
        log_batch(self, run_id, metrics, params, tags)

    monkeypatch.setattr("mlflow.tracking.MlflowClient.log_batch", measured)
    tracker = open_tracker(client)
    params = {f"p{number}": "中" * 6000 for number in range(120)}
    tracker.open_cell(CellFacts(cell="d", stage="d", key="k", params=params))
    values = {f"m{number}": 1.0 for number in range(2500)}
    tracker.log("d", [metrics_event(values, step=1)])
    assert max(sizes) <= validation.MAX_BATCH_LOG_REQUEST_SIZE
    (run,) = [one for one in runs_of(client, "stage") if one.info.run_name == "d"]
    assert (len(run.data.params), len(run.data.metrics)) == (120, 2500)


def test_files_of_any_name_are_artifacts(client: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    names = ["plain.txt", "a#b.txt", "a?b.txt", "a%20b.txt", "deep#1/ü 100%.txt"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    tracker = open_tracker(client, spec_file="dir/spec #1?.yaml", spec_text="text")
    tracker.close_cell("c", CellEnd(state=CellState.DONE, outputs={"told": folder}))
    (run,), (parent,) = runs_of(client, "stage"), runs_of(client, "pipeline")
    for name in names:
        path = f"told/{fit_path(name)}"
        assert artifact(run, path) == name
        assert (path == f"told/{name}") is (name == "plain.txt")
    assert f"told/{names[1]}" in run.data.tags.values()
    assert artifact(parent, fit_path("spec #1?.yaml")) == "text"


def rejected(validate: Callable[[str], object], name: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        validate(name)
    except MlflowException:
        return True
    return False


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec=None), max_size=30) | st.sampled_from(NAMES))
def test_the_rules_are_those_of_the_mlflow_that_is_installed(name: str) -> None:
    from mlflow.utils import validation

    validators = [
        validation._validate_metric_name,
        validation._validate_param_name,
        validation._validate_tag_name,
    ]
    fit = fit_name(name)
    for validate in validators:
        assert not rejected(validate, fit)
        assert not rejected(validate, f"fls.name.{fit_name(name, 241)}")
        if fits(name):
            assert fit == name
        elif not name.endswith("\n") and name and len(name) <= validation.MAX_ENTITY_KEY_LENGTH:
            assert rejected(validate, name), "renamed without need"
    assert 0 < len(fit) <= validation.MAX_ENTITY_KEY_LENGTH
    fit.encode()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("aA@#./ é\n", max_size=4), unique=True, max_size=12))
def test_different_names_stay_different(names: list[str]) -> None:
    params = Fitting().params(dict.fromkeys(names, 1))
    assert len(params) == len(names)
    assert len({fit_label(name, 10) for name in names}) == len(names)
