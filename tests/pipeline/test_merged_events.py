"""Events are merged when their attempt has ended, and every reader has each of them once."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from s3_server import BUCKET
from toy_runs import last_run, run_here, write_spec

from pipeline.store import attempt as attempts
from pipeline.store import layout
from pipeline.store.checksum import lines_with_checksum
from pipeline.store.events import EVENTS_AT_ONCE, EventTail
from pipeline.store.store import Store

KEY = "ab" * 32


class PowerCutError(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def say(store: Store, segments: list[int]) -> Iterator[list[int]]:
    """Let an attempt say so many events a segment; yield the numbers said, after each segment."""
    with store.begin_attempt(KEY) as attempt:
        said: list[int] = []
        for place, count in enumerate(segments, start=1):
            events = [{"type": "metrics", "number": len(said) + one} for one in range(count)]
            events[0].update({"type": "start", "run": "r"} if place == 1 else {})
            events[-1].update({"type": "end"} if place == len(segments) else {})
            said += [event["number"] for event in events]
            attempt.append_events([{"time": 1.0, **as_said(event)} for event in events])
            yield list(said)


def as_said(event: dict[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {"start": {"host": "h", "pid": 1}, "end": {"status": "ok"}}
    values = {"step": None, "values": {"number": event["number"]}}
    return {**event, **more.get(event["type"], values)}


def read(store: Store, after: int = 0, **options: Any) -> tuple[list[int], int]:
    events, last = store.read_events(KEY, 1, after, **options)
    return [event["number"] for event in events], last


def files(folder: str = ".fls") -> list[str]:
    return sorted(path.name for path in Path(folder, "stages", KEY).glob("attempts/*/events/*"))


@pytest.fixture(autouse=True)
def any_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let events say which they are."""
    monkeypatch.setattr("pipeline.store.store.require_event", lambda event: None)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store(".fls")


def test_the_segments_of_an_attempt_become_one_file(store: Store) -> None:
    (*_, said) = say(store, [2, 1, 3, 1])
    assert files() == ["000001.jsonl"]
    assert read(store) == (said, 4)


def test_a_reader_goes_on_from_wherever_it_was(store: Store) -> None:
    seen = {after: list(said) for after, said in enumerate(say(store, [2, 1, 3, 1]), start=1)}
    for after, said in seen.items():
        assert read(store, after) == (seen[4][len(said) :], 4)


def test_segments_too_large_to_be_read_at_once_become_several(store: Store) -> None:
    half = EVENTS_AT_ONCE // 2
    (*_, said) = say(store, [1, half, half, 10, EVENTS_AT_ONCE, 1, 1])
    assert files() == ["000001.jsonl", "000003.jsonl", "000005.jsonl", "000006.jsonl"]
    assert read(store) == (said, 7)
    numbers, last = read(store, limit=1)
    assert (len(numbers), last) == (1 + half, 2)
    assert read(store, 3) == (said[1 + 2 * half :], 7)


@pytest.mark.parametrize("cut", range(12))
def test_a_kill_while_segments_are_merged_loses_and_repeats_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    steps = itertools.count()

    def kill(*_: object) -> None:
        if next(steps) == cut:
            raise PowerCutError

    steps_of = say(store, [1, 2, 1, 1])
    said = [next(steps_of) for _ in range(3)]
    for name in ("write", "remove"):
        true = getattr(type(store.storage), name)

        def step(self: Any, *arguments: Any, true: Any = true) -> Any:
            kill()
            result = true(self, *arguments)
            kill()
            return result

        monkeypatch.setattr(type(store.storage), name, step)
    with suppress(PowerCutError):
        said.append(next(steps_of))
    everything, last = read(store)
    assert everything in ([*said[2]], [*said[2], 4])
    for after, before in enumerate(said[:3], start=1):
        assert read(store, after) == (everything[len(before) :], last)


def test_a_merge_is_seen_by_a_reader_between_any_two_of_its_steps(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], int]] = []
    remove = type(store.storage).remove

    def watched(self: Any, path: str) -> None:
        seen.extend(read(store, after) for after in (0, 1, 2, 3))
        remove(self, path)
        seen.extend(read(store, after) for after in (0, 1, 2, 3))

    steps = say(store, [1, 1, 1, 1])
    for _ in range(3):
        next(steps)
    monkeypatch.setattr(type(store.storage), "remove", watched)
    next(steps)
    assert len(seen) == 3 * 2 * 4
    for place, (numbers, last) in enumerate(seen):
        assert (numbers, last) == ([0, 1, 2, 3][place % 4 :], 4)


def test_a_damaged_merged_segment_is_told_once_and_what_follows_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "EVENTS_AT_ONCE", 3)
    list(say(store, [1, 1, 1, 2]))
    assert files() == ["000001.jsonl", "000004.jsonl"]
    path = Path(".fls", layout.event_segment(KEY, 1, 1))
    path.write_bytes(path.read_bytes()[:-3])
    for after in (0, 1, 2):
        events, last = store.read_events(KEY, 1, after)
        texts = [event["text"] for event in events if event["type"] == "text"]
        assert [text.partition(" (")[0] for text in texts] == [
            "segment 1 of the events of attempt 1 is damaged"
        ]
        assert [event["number"] for event in events if "number" in event] == [3, 4]
        assert last == 4


@pytest.mark.parametrize(
    "head",
    [
        {"type": "merged"},
        {"type": "merged", "events": 3},
        {"type": "merged", "events": [2, 2]},
        {"type": "merged", "events": [-1, 4]},
        {"type": "merged", "events": [True, 2]},
        {"type": "merged", "events": [3, 0]},
        {"type": "merged", "events": [10**30]},
    ],
)
def test_a_forged_merged_segment_counts_as_damaged(store: Store, head: dict[str, Any]) -> None:
    list(say(store, [1, 1, 1]))
    events = [{"type": "text", "time": 1.0, "text": "x"}] * 3
    store.storage.write(layout.event_segment(KEY, 1, 1), lines_with_checksum([head, *events]))
    (start, text), last = store.read_events(KEY, 1)
    assert (start["type"], last) == ("start", 1)
    assert "is damaged (its first line does not fit the others)" in text["text"]


def test_what_has_ended_is_not_asked_for_more(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(say(store, [1, 1, 1]))
    asked = []
    read_file, names = type(store.storage).read, type(store.storage).names
    for name, true in (("read", read_file), ("names", names)):

        def noted(self: Any, path: str, true: Any = true) -> Any:
            asked.append(path)
            return true(self, path)

        monkeypatch.setattr(type(store.storage), name, noted)
    assert read(store) == ([0, 1, 2], 3)
    assert asked == [layout.event_segment(KEY, 1, 1)]


def test_a_kill_at_a_checkpoint_loses_nothing_that_was_said_before_it(store: Store) -> None:
    def be_killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), store.begin_attempt(KEY) as attempt:
        attempt._save_checkpoint = be_killed  # type: ignore[method-assign]
        said = {"type": "text", "time": 0.0, "text": "step 1"}
        attempt.append_events([said, {"type": "checkpoint", "time": 0.0, "number": 1}])
    assert store.read_events(KEY, 1) == ([said], 1)


def test_segments_are_merged_on_s3(s3: str, tmp_path: Path) -> None:
    store = Store(f"s3://{BUCKET}/{tmp_path.name}")
    seen = {after: list(said) for after, said in enumerate(say(store, [2, 1, 3, 1]), start=1)}
    assert store.storage.names(f"stages/{KEY}/attempts/0001/events") == ["000001.jsonl"]
    for after, said in {0: [], **seen}.items():
        assert read(store, after) == (seen[4][len(said) :], 4)


def test_a_run_leaves_one_file_of_events_a_cell_and_hears_them_all(toy: Path) -> None:
    write_spec("    slow: {uses: slow, params: {steps: 25, delay_s: 0.1}}\n")
    assert run_here()[0] == 0
    record = last_run()
    (segment,) = Path(".fls/stages").glob("*/attempts/*/events/*")
    events, _ = EventTail(Store(".fls"), record.run_id, {}).read("slow", record.cells["slow"].key)
    assert (events[0]["type"], events[-1]["type"]) == ("start", "end")
    (lines,) = Path("tracking").glob("*.jsonl")
    tracked = [line for line in lines.read_text().splitlines() if '"type": "checkpoint"' in line]
    assert len(tracked) == sum(event["type"] == "checkpoint" for event in events) > 1
    assert segment.name == "000001.jsonl"
