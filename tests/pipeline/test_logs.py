"""What a stage prints: kept, bounded, without secrets, and nobody's burden but its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_local_executor import collect
from test_worker import KEY, events_of, plugin, start_task
from toy_runs import (
    ROOT,
    fls,
    last_run,
    log_lines,
    run_here,
    start_fls,
    states,
    wait_for,
    write_spec,
)

from pipeline.base.states import CellState
from pipeline.executors.local import LocalExecutor
from pipeline.running.runs import load_runs
from pipeline.stage import Resources
from pipeline.store.checksum import lines_with_checksum
from pipeline.store.events import EVENTS_AT_ONCE, EventTail, EventWriter
from pipeline.store.logs import LogStream, LogWriter, last_lines, read_text, segments
from pipeline.store.storage.local import LocalStorage
from pipeline.store.store import Store
from pipeline.worker.worker import run_task

SAVE = "\nsave_number(ctx, 1)"


def write_stage(body: str) -> None:
    """Make the toy's stage `fail` one with this body."""
    plugin(body)
    catalogue = Path("toy/catalogue.py")
    catalogue.write_text(catalogue.read_text().replace('"toy.slow:fail"', '"toy.extra:stage"'))


class Log:
    """A log in a folder, and what its readers see."""

    def __init__(self, root: Path, limit_bytes: int):
        self.storage = LocalStorage(root)
        self.writer = LogWriter(root / "attempt/log", limit_bytes)
        self.stream = LogStream(self.writer)

    def text(self, start: int = 0) -> str:
        found = segments(self.storage, "attempt")
        return "".join(text for text, _ in read_text(self.storage, found, start))

    def lines(self) -> list[str]:
        return [line[10:] for line in self.text().splitlines()]

    def tail(self, count: int) -> list[str]:
        found = segments(self.storage, "attempt")
        return last_lines(self.storage, found, count).splitlines()

    def bytes(self) -> int:
        return sum(one.bytes for one in segments(self.storage, "attempt"))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path, 16_000)
    with log.writer:
        yield log


def left_out(text: str) -> int:
    (line,) = [line for line in text.splitlines() if line.startswith("... ")]
    return int(line.split()[1].replace(",", ""))


def test_of_a_long_log_the_beginning_and_the_end_are_kept(log: Log) -> None:
    for number in range(2000):
        print(f"line {number} " + "x" * 80, file=log.stream)
    lines = log.lines()
    assert lines[0].startswith("line 0 ")
    assert lines[-1].startswith("line 1999 ")
    assert 12_000 < log.bytes() <= 16_000
    whole = sum(len(f"{'0:00':>8}  line {number} ") + 81 for number in range(2000))
    assert left_out(log.text()) + log.bytes() == whole
    assert len(log.tail(5)) == 5
    assert log.tail(5)[-1].endswith(lines[-1])
    assert left_out("\n".join(log.tail(10_000))) == left_out(log.text())


def test_one_endless_line_and_one_huge_text_are_bounded_as_well(log: Log) -> None:
    for _ in range(100):
        log.stream.write("y" * 10_000)
    assert log.bytes() <= 16_000 + 1000
    print("first\n" + "z\n" * 100_000 + "last", file=log.stream)
    assert log.bytes() <= 16_000 + 1000
    assert log.lines()[-1] == "last"


def test_what_is_written_can_be_read_at_once_and_from_any_line_on(log: Log) -> None:
    print("one", file=log.stream)
    assert log.lines() == ["one"]
    read = log.bytes()
    print("two\n\nthree", file=log.stream)
    assert [line[10:] for line in log.text(read).splitlines()] == ["two", "three"]


def test_an_unfinished_line_is_shown_when_it_is_flushed_and_replaced_when_it_ends(
    log: Log,
) -> None:
    print("loading a very long name ... ", end="", flush=True, file=log.stream)
    assert log.lines() == ["loading a very long name ..."]
    log.stream.write("\rdone\n")
    assert log.lines() == ["done"]
    for step in range(12):
        print(f"\r{step} of 12", end="", flush=True, file=log.stream)
    print("other", file=log.stream)
    assert log.lines() == ["done", "11 of 12other"]


def test_a_forked_child_does_not_write_into_its_parents_log(log: Log, capfd: Any) -> None:
    print("half a ", end="", file=log.stream)
    child = os.fork()
    if child == 0:
        print("of the child", file=log.stream)
        os._exit(0)
    os.waitpid(child, 0)
    print("line", file=log.stream)
    assert log.lines() == ["half a line"]
    assert "of the child" in capfd.readouterr().err


def test_a_stream_that_is_held_beyond_its_end_writes_into_the_present_log_or_nowhere(
    log: Log, tmp_path: Path
) -> None:
    with log.stream as held:
        print("first", file=held)
    print("nowhere", file=held, flush=True)
    later = Log(tmp_path / "later", 16_000)
    with later.writer, later.stream:
        print("second", file=held, flush=True)
        print("half a line", end="", file=held, flush=True)
        assert later.lines() == ["second", "half a line"]
    assert log.lines() == ["first"]


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    value = "5entinel-of-a-token"
    monkeypatch.setenv("HF_TOKEN", value)
    return value


def test_secrets_are_hidden_wherever_they_stand(log: Log, secret: str) -> None:
    print(f"token {secret}", file=log.stream)
    print(f"a\nb{secret}\nc", file=log.stream)
    log.stream.write("x" * (64 * 1024 - 10) + secret[:10])  # a line that is cut right there
    log.stream.write(secret[10:] + "\n")
    print(secret, end="", flush=True, file=log.stream)
    assert secret not in log.text()
    assert "5entinel" not in log.text()
    assert log.lines()[:4] == ["token ***", "a", "b***", "c"]


def test_a_secret_that_a_stage_sets_itself_is_hidden_from_then_on(toy: Path) -> None:
    body = "print('first')\nos.environ['NEW_TOKEN'] = '5entinel-late'\nprint('5entinel-late')"
    try:
        assert run_task(plugin(body + SAVE))["status"] == "ok"
    finally:
        os.environ.pop("NEW_TOKEN", None)
    assert log_lines(KEY)[:2] == ["first", "***"]


@pytest.fixture
def executor(toy: Path) -> Iterator[LocalExecutor]:
    executor = LocalExecutor()
    yield executor
    executor.stop()


@pytest.mark.parametrize(
    ("death", "said"),
    [
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "Fatal Python error: Segmentation fault"),
        ("os.write(2, b'from C\\n'); os._exit(7)", "from C"),
    ],
)
def test_what_a_process_printed_last_outlives_it(
    executor: LocalExecutor, death: str, said: str
) -> None:
    body = f"print('last words')\nprint('not even an end', end='', flush=True)\n{death}"
    executor.submit(plugin(body), Resources())
    outcome = collect(executor, 1)["cell"]
    assert outcome["status"] == "died"
    assert said in outcome["error"]["message"]
    assert log_lines(KEY) == ["last words", "not even an end"]


def test_output_past_python_joins_the_log(executor: LocalExecutor, secret: str) -> None:
    body = (
        "import subprocess\n"
        "os.write(1, b'from C\\n')\n"
        "subprocess.run([sys.executable, '-c', 'print(\"of a child\")'], check=True)\n"
        "subprocess.run(['echo', os.environ['HF_TOKEN']], stdout=sys.stdout, check=True)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    print('of a fork', flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)"
    )
    executor.submit(plugin(body + SAVE), Resources())
    assert collect(executor, 1)["cell"]["status"] == "ok"
    assert {"from C", "of a child", "***", "of a fork"} <= set(log_lines(KEY))
    executor.submit(start_task(key="b" * 64), Resources())  # to the same worker
    assert collect(executor, 1)["cell"]["status"] == "ok"
    assert not {"from C", "of a fork"} & set(log_lines("b" * 64))


def test_a_logging_handler_of_an_earlier_cell_writes_into_the_log_of_the_present_one(
    executor: LocalExecutor,
) -> None:
    task = plugin(
        "import logging\n"
        "logger = logging.getLogger('toy.warm')\n"
        "print('handlers before:', len(logger.handlers))\n"
        "if not logger.handlers:\n"
        "    logger.addHandler(logging.StreamHandler())\n"
        "logger.warning('said by %s', ctx.cell)" + SAVE
    )
    for key, before in ((KEY, 0), ("b" * 64, 1)):  # by the same worker
        executor.submit({**task, "key": key}, Resources())
        assert collect(executor, 1)["cell"]["status"] == "ok"
        assert log_lines(key)[:2] == [f"handlers before: {before}", "said by cell"]


def test_a_log_in_an_object_store_is_the_same(toy: Path) -> None:
    body = "for i in range(500):\n    print(f'line {i} of many')\nprint('end', end='')" + SAVE
    store = Store("memory://logs")
    task = {**plugin(body), "storage": store.url, "token": store.prepare(), "log_bytes": 4000}
    assert run_task(task)["status"] == "ok"  # type: ignore[arg-type]
    found = store.log_segments(KEY, 1)
    assert sum(segment.bytes for segment in found) <= 4000
    text = "".join(text for text, _ in read_text(store.storage, found))
    assert "line 0 of many" in text
    assert "  end\n" in text
    assert left_out(text) > 1000


def test_logs_can_be_read_whole_from_the_end_and_as_they_come(toy: Path) -> None:
    write_stage(
        "import time\nfor i in range(30):\n    print('line', i)\n    time.sleep(0.1)\n"
        "ctx.say('\x1b[31mred')" + SAVE
    )
    write_spec("chatty: {uses: fail, log_bytes: 2KB}")
    process = start_fls("run", "--executor", "local", "--tracking", "jsonl")
    wait_for(lambda: log_of_last_run("chatty"))
    code, followed, errors = fls("logs", "chatty", "--follow")
    assert (code, errors) == (0, "")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    for number in range(30):
        assert followed.count(f"  line {number}\n") == 1
    assert followed.splitlines()[-1] == "chatty: done"
    code, whole, _ = fls("logs", "chatty")
    assert whole.splitlines()[0].startswith("attempt 1 on ")
    assert whole.splitlines()[1].endswith("0:00  line 0")
    assert "\\x1b[31mred" in whole
    assert [line[10:] for line in fls("logs", "chatty", "--tail", "2")[1].splitlines()[1:]] == [
        whole.splitlines()[-2][10:],
        whole.splitlines()[-1][10:],
    ]
    followed = fls("logs", "chatty", "--tail", "1", "--follow")[1]
    assert followed.splitlines()[1] == whole.splitlines()[-1]
    assert fls("logs", "chatty", "--tail", "-1")[0] == 2


def log_of_last_run(cell: str) -> bool:
    runs, _ = load_runs(Store(".fls"))
    return bool(runs) and bool(Store(".fls").log_segments(runs[-1].cells[cell].key, 1))


def test_logs_of_attempts_that_are_older_than_logs_remain_readable(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    assert run_here()[0] == 0
    store, key = Store(".fls"), last_run().cells["start"].key
    store.storage.remove(f"stages/{key}/attempts/0001/log")
    old = [
        {"type": "start", "time": 100.0, "run": last_run().run_id, "host": "old", "pid": 1},
        {"type": "text", "time": 161.0, "text": "as it was said then"},
        {"type": "metrics", "time": 162.0, "step": 3, "values": {"loss": 0.5}},
    ]
    store.storage.write(f"stages/{key}/attempts/0001/events/000001.jsonl", lines_with_checksum(old))
    code, output, _ = fls("logs", "start")
    assert code == 0
    assert output.splitlines()[:3] == [
        "attempt 1 on old",
        "    1:01  as it was said then",
        "    1:02  step 3: loss 0.5",
    ]


def test_of_progress_and_sayings_the_driver_hears_the_latest_alone() -> None:
    written: list[list[dict[str, Any]]] = []
    writer = EventWriter(written.append)
    for number in range(10_000):
        writer.emit({"type": "progress", "time": 0.0, "done": number})
        writer.emit({"type": "text", "time": 0.0, "text": str(number)})
    writer.emit({"type": "metrics", "time": 0.0, "values": {}})
    writer.flush()
    assert [[event["type"] for event in events] for events in written] == [
        ["progress", "text", "metrics"]
    ]
    assert [written[0][0]["done"], written[0][1]["text"]] == [9999, "9999"]


def test_a_flood_of_metrics_is_read_in_bounded_turns_and_none_is_lost(toy: Path) -> None:
    count = 2 * EVENTS_AT_ONCE + 10
    write_stage(f"for i in range({count}):\n    ctx.log({{'loss': i}}, step=i)" + SAVE)
    write_spec("chatty: {uses: fail, retries: 0}")
    assert run_here()[0] == 0
    assert states(last_run()) == {"chatty": CellState.DONE}
    tail, turns = EventTail(Store(".fls"), last_run().run_id, {}), []
    while events := tail.read("chatty", last_run().cells["chatty"].key)[0]:
        turns.append(len(events))
    assert max(turns) < 2 * EVENTS_AT_ONCE
    (lines,) = Path("tracking").glob("*.jsonl")
    assert lines.read_text().count('"loss"') == count


def test_a_driver_with_a_chatty_stage_heeds_a_signal_and_shows_a_siblings_failure(
    toy: Path,
) -> None:
    write_stage(
        "import time\n"
        "if ctx.params.how == 'bug':\n"
        "    time.sleep(1)\n"
        "    raise ValueError('of the sibling')\n"
        "end = time.monotonic() + 60\n"
        "while time.monotonic() < end:\n"
        "    print('x' * 99)"
    )
    write_spec("chatty: {uses: fail}\nsibling: {uses: fail, params: {how: bug}}")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "--executor", "local", "--tracking", "jsonl"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "sibling failed: ValueError: of the sibling" in line:
            break
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert any("Stopping" in line for line in process.stdout)
    heeded_s = time.monotonic() - began
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    process.stdout.close()
    assert heeded_s < 5  # a second on a machine that does nothing else
    wait_for(lambda: last_run().observed_state() != "running")


def test_the_events_of_a_chatty_stage_are_few(toy: Path) -> None:
    assert run_task(plugin("for i in range(1000):\n    print(i)\n    ctx.say(str(i))" + SAVE))
    assert len(events_of()) < 20
