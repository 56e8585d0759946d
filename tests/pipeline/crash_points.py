"""Kills publications at chosen points, and looks at what is left.

    python crash_points.py FOLDER COUNT SEED

Each case is a process of its own (a fork) that ends, without any clean-up, before its n-th
operation on the store, or in the middle of it if it is a write; or a killing at a random time; or,
for storage that is no folder, an exception that nothing may catch. Then another attempt is made, by
a new process's view of the store. One JSON line a case goes to standard output.
"""

import builtins
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pipeline.store.storage.local
from pipeline.base.errors import Damaged
from pipeline.stage import Context
from pipeline.store.attempt import Attempt
from pipeline.store.store import Store

KEY = "k" * 64
TEXTS = {"one.txt": "1" * 300, "two.txt": "2" * 300, "deep/three.txt": "3" * 300}
WATCHED = {"open", "os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir"}
SCENARIOS = ["publish", "beside", "remake", "lose"]


class Killed(BaseException):
    """The end of a process that has none of its own."""


def end_process() -> None:
    os._exit(9)


class Clock:
    """Counts operations; before the last one, `end` is called."""

    def __init__(self) -> None:
        self.count = 0
        self.last: float | None = None  # None: not counting
        self.end: Callable[[], None] = end_process

    def start(self, last: float, end: Callable[[], None]) -> None:
        self.count, self.last, self.end = 0, last, end

    def tick(self) -> bool:
        """Count an operation; tell whether it is the last one, to be done by halves."""
        if self.last is None:
            return False
        self.count += 1
        return self.count >= self.last

    def step(self, *_: object) -> None:
        if self.tick():
            self.end()


CLOCK = Clock()


def halting_open(path: Any, mode: str = "r", **options: Any) -> Any:
    """Open a file whose writing may end half-way."""
    file = builtins.open(path, mode, **options)
    if "r" in mode:
        return file
    write = file.write

    class Halting:
        def __enter__(self) -> "Halting":
            return self

        def __exit__(self, *_: object) -> None:
            file.close()

        def write(self, data: Any) -> None:
            if CLOCK.tick():
                write(data[: len(data) // 2])
                file.flush()
                CLOCK.end()
            write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    return Halting()


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in WATCHED and CLOCK.last is not None:
        CLOCK.step()


# ------------------------------------------------------------------------------ what is killed


def write_checkpoint(attempt: Attempt, number: int) -> None:
    with Context(params=None, folder=attempt.folder).checkpoint() as folder:
        for name in ("state.txt", "more.txt"):
            with halting_open(folder / name, "w") as file:
                file.write(f"{number}" * 200)
    attempt.append_events([{"type": "checkpoint", "number": number}])


def write_outputs(attempt: Attempt) -> None:
    for output in ("number", "other"):
        folder = Context(params=None, folder=attempt.folder).output(output)
        (folder / "deep").mkdir(exist_ok=True)
        for name, text in TEXTS.items():
            with halting_open(folder / name, "w") as file:
                file.write(text)


def make_attempt(store: Store) -> bool:
    with store.begin_attempt(KEY) as attempt:
        check_checkpoint(attempt)
        number = len(list((attempt.folder / "checkpoints").glob("0*"))) + 1
        for step in range(number, number + 2):
            write_checkpoint(attempt, step)
        write_outputs(attempt)
        return attempt.publish({"stage": "toy"}, ["number", "other"], {})


def prepare(store: Store, scenario: str) -> None:
    """Bring about what is there before the attempt that is killed."""
    if scenario == "beside":  # an attempt that was killed with a checkpoint
        attempt = store.begin_attempt(KEY)
        write_checkpoint(attempt, 1)
    if scenario in {"remake", "lose"}:
        assert make_attempt(store)
    if scenario == "remake":
        store.storage.write(f"stages/{KEY}/manifest.json", b'{"key":')


# -------------------------------------------------------------------------------- what is left


def check_checkpoint(attempt: Attempt) -> None:
    last = Context(params=None, folder=attempt.folder).last_checkpoint()
    if last is not None:
        for name in ("state.txt", "more.txt"):
            assert (last / name).read_text() == str(int(last.name)) * 200, f"half of {last}/{name}"


def check_result(store: Store) -> str:
    """Check that what is called complete is; return what there is."""
    try:
        manifest = store.manifest(KEY)
    except Damaged:
        return "damaged"
    if manifest is None:
        return "absent"
    assert set(manifest.outputs) == {"number", "other"}
    for output in manifest.outputs:
        folder = store.fetch(KEY, output)
        assert {name: (folder / name).read_text() for name in TEXTS} == TEXTS
    return "complete"


def check_left(store: Store, scenario: str) -> str:
    found = check_result(store)
    assert found != "damaged" or scenario == "remake", "a manifest was half written"
    first = make_attempt(store)
    assert first == (found != "complete"), "the next attempt did not publish"
    assert check_result(store) == "complete"
    names = store.storage.names(f"stages/{KEY}")
    assert names == ["attempts", "manifest.json"], names
    return found


# ----------------------------------------------------------------------------------- the cases


def in_a_process(action: Callable[[], object]) -> int:
    """Fork a process that does something and ends; return its id."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_operations(root: Path, scenario: str) -> int:
    prepare(Store(str(root)), scenario)

    def count() -> None:
        CLOCK.start(float("inf"), end_process)
        make_attempt(Store(str(root)))
        CLOCK.last = None
        Path(f"{root}.count").write_text(str(CLOCK.count))

    assert exit_code(in_a_process(count)) == 0
    return int(Path(f"{root}.count").read_text())


def killed_at(root: Path, scenario: str, last: int) -> None:
    def run() -> None:
        CLOCK.start(last, end_process)
        make_attempt(Store(str(root)))

    assert exit_code(in_a_process(run)) == 9, "the process was not killed"


def killed_after(root: Path, delay_s: float) -> None:
    child = in_a_process(lambda: make_attempt(Store(str(root))))
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) in {0, -signal.SIGKILL}


@contextmanager
def dying_file_system(store: Store, last: float) -> Any:
    """Let every operation of fsspec's file system raise from the n-th one on."""

    def end() -> None:
        raise Killed

    def counted(operation: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            CLOCK.step()
            return operation(*arguments, **options)

        return call

    fs = store.storage.fs
    names = ["pipe_file", "put_file", "get_file", "cat_file", "cp_file", "ls", "find", "rm"]
    CLOCK.start(last, end)
    try:
        with patch.multiple(fs, **{name: counted(getattr(fs, name)) for name in names}):
            yield
    finally:
        CLOCK.last = None


def dies_at(store: Store, last: float) -> bool:
    with dying_file_system(store, last):
        try:
            make_attempt(store)
        except Killed:
            return True
    return False


def run_case(folder: Path, number: int, chance: random.Random, totals: dict[str, int]) -> Any:
    kind = "kill" if number % 20 == 0 else "remote" if number % 5 == 0 else "fork"
    scenario = chance.choice(SCENARIOS)
    about = {"case": f"crash-{number}", "kind": kind, "scenario": scenario}
    root = folder / f"case-{number}"
    url = f"memory://crash-{os.getpid()}-{number}" if kind == "remote" else str(root)
    store = Store(url)
    if kind == "kill":
        prepare(store, scenario)
        about["at_s"] = chance.uniform(0, 0.03)
        killed_after(root, about["at_s"])
    elif kind == "fork":
        if scenario not in totals:
            totals[scenario] = count_operations(folder / f"count-{scenario}", scenario)
        prepare(store, scenario)
        about["at"], about["of"] = chance.randint(1, totals[scenario]), totals[scenario]
        killed_at(root, scenario, about["at"])
    else:
        prepare(store, scenario)
        about["at"] = chance.randint(1, 40)
        about["died"] = dies_at(store, about["at"])
    about["found"] = check_left(Store(url), scenario)
    shutil.rmtree(root, ignore_errors=True)
    return about


def main(folder: Path, count: int, seed: int) -> int:
    sys.addaudithook(watch)
    chance = random.Random(seed)  # noqa: S311
    totals: dict[str, int] = {}
    failed = 0
    with (
        patch("os.fsync"),
        patch.object(pipeline.store.storage.local, "open", halting_open, create=True),
    ):
        for number in range(seed * 10_000, seed * 10_000 + count):
            try:
                line = {**run_case(folder, number, chance, totals), "ok": True}
            except Exception as error:  # a finding
                line = {"case": f"crash-{number}", "ok": False, "error": repr(error)}
                failed += 1
            sys.stdout.write(json.dumps(line) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
