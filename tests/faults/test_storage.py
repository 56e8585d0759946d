"""What storage may do to a run: fill up, break, lie, fall silent, or lose its power."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flaky_proxy import FlakyProxy, flaky
from lossy_disk import LossyDisk
from results_at_risk import KEY, check_left, publish
from s3_server import BUCKET, s3_environment
from toy_runs import ROOT, fls, last_run, numbers, ran, run_here, write_spec

from pipeline.stage import Context
from pipeline.store.store import Store

Record = Callable[[str, object], None]
HERE = Path(__file__).parent
RUN = ("run", "--executor", "local", "--tracking", "jsonl")
STAGES = """
    start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 10}}
    slow: {uses: slow, matrix: {seed: [0, 1]}, inputs: {number: start}, params: {delay_s: 0}}
    total: {uses: total, inputs: {numbers: slow}}
    report: {uses: report, inputs: {results: total}}
    broken: {uses: fail, params: {how: user}}
"""
GOOD = {"start[seed=0]", "start[seed=1]", "slow[seed=0]", "slow[seed=1]", "total", "report"}
_counter = itertools.count()


# ------------------------------------------------------------- damage, in each kind of artefact


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a finished run, one of whose cells failed."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(HERE.parent / "pipeline/toy", folder / "toy")
    before = os.getcwd()
    os.chdir(folder)
    try:
        write_spec(STAGES)
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *RUN, "--force", "start[seed=0]"],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
    finally:
        os.chdir(before)
    return folder


def stage_file(cell: str, *rest: str) -> Callable[[], Path]:
    return lambda: Path(".fls/stages", last_run().cells[cell].key, *rest)


def run_file(name: str) -> Callable[[], Path]:
    return lambda: Path(".fls/runs", last_run().run_id, f"{name}.json")


ATTEMPT = "attempts/0001"
ARTEFACTS = {
    "manifest": stage_file("slow[seed=0]", "manifest.json"),
    "output": stage_file("slow[seed=0]", ATTEMPT, "outputs/number/number.json"),
    "promoted output": stage_file("report", ATTEMPT, "outputs/report/table.md"),
    "events": stage_file("slow[seed=0]", ATTEMPT, "events/000001.jsonl"),
    "attempt.json": stage_file("slow[seed=0]", ATTEMPT, "attempt.json"),
    "failure.json": stage_file("broken", ATTEMPT, "failure.json"),
    "run": run_file("run"),
    "state": run_file("state"),
    "tracking": run_file("tracking"),
    "plan": run_file("plan"),
    "storage.json": lambda: Path(".fls/storage.json"),
    "generation": lambda: next(Path(".fls/generations").iterdir()),
}


def damage(path: Path, how: str, chance: random.Random) -> None:
    """Truncate a file, flip one of its bits, or fill it with zeros, as file systems do."""
    data = bytearray(path.read_bytes() or b"x")
    if how == "truncated":
        data = data[: chance.randrange(len(data))]
    elif how == "empty":
        data.clear()
    elif how == "zeros":
        data = bytearray(len(data))
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def commands(*others: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """Run what may be asked of a store; a traceback is raised here."""
    for arguments in (
        ("status",),
        ("status", "last"),
        ("logs", "slow[seed=0]"),
        ("logs", "broken"),
        ("plan", "--why"),
        ("results",),
        *others,
    ):
        code, output, errors = fls(*arguments)
        yield arguments, code, output + errors


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_damage_is_noticed(finished: Path, toy: Path, artefact: str, how: str) -> None:
    shutil.copytree(finished / ".fls", ".fls")
    write_spec(STAGES)
    undisturbed, kept = numbers(), last_run()
    path = ARTEFACTS[artefact]()
    chance = random.Random(f"{artefact} {how}")  # noqa: S311
    damage(path, how, chance)
    said = {arguments: text for arguments, code, text in commands() if code in {0, 1, 2}}
    assert len(said) == 6
    seen = "\n".join(said.values())
    if artefact in {"state", "tracking", "run", "failure.json"}:
        assert "damaged" in seen
    if "events" in artefact:  # read by tracking, and by nothing that prints
        code, output, _ = fls("verify")
        assert code == 1
        assert str(path.relative_to(".fls")) in output
    if artefact == "manifest":
        assert "slow[seed=0]: run: stored result damaged" in said["plan", "--why"]

    if artefact == "storage.json":
        code, _, errors = fls(*RUN)
        assert code == 1
        assert "storage.json is damaged" in errors
        assert "delete it while nothing runs" in errors
        path.unlink()
    # What needs the damaged file is made again, and nothing else; the failed cell tries again.
    force = ("--force", "total") if artefact == "output" else ()
    code, output, errors = fls(*RUN, *force)
    assert (code, errors) == (1, ""), output
    assert "broken failed" in output
    if artefact == "promoted output":
        assert "differs from its manifest. The next `fls run` computes it again." in output
        assert fls(*RUN)[0] == 1
    again = {"manifest": {"slow[seed=0]"}, "promoted output": {"report"}}
    again["output"] = {"slow[seed=0]", "total", "report"}
    assert set(ran()) == again.get(artefact, set())
    assert numbers() == undisturbed
    if artefact not in {"run", "storage.json"}:
        code, output, errors = fls("resume", kept.run_id)
        assert code == 1, errors


@pytest.mark.parametrize("how", ["truncated", "flipped", "flipped again", "empty", "zeros"])
@pytest.mark.parametrize("file", ["state.txt", ".digests.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str, how: str) -> None:
    store = Store(str(tmp_path))
    first = store.begin_attempt(KEY)
    context = Context(params=None, folder=first.folder)
    for text in ("one", "two"):
        with context.checkpoint() as folder:
            (folder / "state.txt").write_text(text)
        first.append_events([{"type": "checkpoint"}])
    chance = random.Random(f"{file} {how}")  # noqa: S311
    damage(first.folder / "checkpoints/000002" / file, how, chance)
    last = Context(params=None, folder=store.begin_attempt(KEY).folder).last_checkpoint()
    assert last is not None
    assert (last / "state.txt").read_text() == "one"


# ---------------------------------------------------------------------- full and broken disks


def in_own_namespace(program: str, *arguments: str) -> dict[str, Any]:
    """Run a program that mounts file systems, where nobody else sees them."""
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, str(HERE / program), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_full_disk_is_named_and_forgiven(toy: Path) -> None:
    write_spec(
        """
        start: {uses: start, params: {value: 10}}
        slow: {uses: slow, inputs: {number: start}, params: {steps: 3000, delay_s: 0.001}}
        add: {uses: add, matrix: {amount: [1, 2, 3]}, inputs: {number: slow}}
        """
    )
    found = in_own_namespace("full_disk.py", str(toy))
    for name in ("full from the start", "full in the middle"):
        assert found[name]["code"] == 1, found[name]
        text = found[name]["errors"] + found[name]["output"]
        assert "No space left on device" in text
        assert "Traceback" not in text
    assert found["manifests"] < 5
    assert (found["again"]["code"], found["again"]["errors"]) == (0, "")
    assert set(ran().values()) == {1}


@pytest.mark.parametrize("artefact", ["output", "manifest", "storage.json", "state"])
def test_a_read_error(finished: Path, toy: Path, artefact: str) -> None:
    shutil.copytree(finished / ".fls", ".fls")
    write_spec(STAGES)
    path = ARTEFACTS[artefact]()
    arguments = {"state": ("status", "last")}.get(artefact, (*RUN, "--force", "total"))
    found = in_own_namespace("bad_sector.py", str(toy), str(path), "--", *arguments)
    text = found["errors"] + found["output"]
    assert "Traceback" not in text
    if artefact == "output":  # a mount cannot be renamed: it cannot be set aside here
        assert "cannot be read" in text
        assert found["code"] == 1
    else:
        assert f"{path}: Input/output error" in text
        assert found["code"] == 1


# ------------------------------------------------------------------------------------- S3


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    with flaky(s3_endpoint) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.mark.parametrize("fault", ["500", "drop", "lost", "mixed"])
def test_a_run_on_an_s3_that_fails_every_fifth_time(
    toy: Path, proxy: FlakyProxy, record_property: Record, fault: str
) -> None:
    chance = random.Random(fault)  # noqa: S311
    storage = f"s3://{BUCKET}/flaky-{next(_counter)}"
    faults = ["500", "503", "429", "drop", "lost"] if fault == "mixed" else [fault]
    failed = 0

    def fail(method: str, path: str) -> str | None:
        nonlocal failed
        if chance.random() < 0.8:
            return None
        failed += 1
        return chance.choice(faults)

    proxy.fault = fail
    write_spec(
        STAGES.replace("    broken: {uses: fail, params: {how: user}}\n", ""), storage=storage
    )
    code, output = run_here()
    assert code == 0, output
    assert failed > 20
    assert ran() == dict.fromkeys(GOOD, 1)
    proxy.fault = lambda method, path: None
    assert run_here()[1].startswith("Nothing to do")
    store = Store(storage)
    for status in last_run(storage).cells.values():
        assert store.attempts(status.key) == [1]
    record_property("failed", failed)


def test_an_s3_that_is_away_for_a_while_only_delays_a_run(toy: Path, proxy: FlakyProxy) -> None:
    storage = f"s3://{BUCKET}/away-{next(_counter)}"
    write_spec("slow: {uses: slow, params: {steps: 40, delay_s: 0.05}}", storage=storage)
    window = iter(range(10_000))
    proxy.fault = lambda method, path: "503" if 60 <= next(window) < 84 else None
    code, output = run_here()
    assert code == 0, output
    assert ran() == {"slow": 1}


def test_an_s3_that_never_comes_back_ends_a_run_with_one_message(
    toy: Path, proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLS_PATIENCE_S", "2")
    storage = f"s3://{BUCKET}/ended-{next(_counter)}"
    write_spec("slow: {uses: slow, params: {steps: 400, delay_s: 0.05}}", storage=storage)
    window = iter(range(10_000))
    proxy.fault = lambda method, path: "500" if next(window) >= 80 else None
    code, _, errors = fls(*RUN)
    assert code == 1
    assert errors.startswith(f"{storage}: cannot ")
    assert "tried for" in errors
    assert errors.count("\n") == 1


# ----------------------------------------------------------------- back from the dead, and cuts


@pytest.mark.parametrize("storage", ["folder", "s3"])
@pytest.mark.parametrize("when", ["published", "set aside", "made anew"])
def test_an_attempt_that_comes_back_from_the_dead(
    tmp_path: Path, s3: str, storage: str, when: str
) -> None:
    url = str(tmp_path / "store") if storage == "folder" else f"s3://{BUCKET}/undead-{when[0]}"
    store = Store(url)
    undead = store.begin_attempt(KEY)
    context = Context(params=None, folder=undead.folder)
    (context.output("number") / "number.txt").write_text("half")
    with context.checkpoint() as folder:
        (folder / "state.txt").write_text("1")
    publish(store, "5")
    winner = 2
    if when != "published":
        store.storage.write(f"stages/{KEY}/manifest.json", b"{}")
        assert store.set_aside(KEY)
    if when == "made anew":
        publish(store, "5")
        winner = 3
    undead.append_events([{"type": "checkpoint", "number": 1}])
    (context.output("number") / "late.txt").write_text("late")
    if when == "set aside":
        with pytest.raises(FileNotFoundError, match="set aside"):
            undead.publish({}, ["number"], {})
        assert store.manifest(KEY) is None
        publish(store, "5")
        winner = 3
    assert not undead.publish({}, ["number"], {})
    manifest = store.manifest(KEY)
    assert manifest is not None
    assert manifest.attempt == winner
    assert (store.fetch(KEY, "number") / "number.txt").read_text() == "5" * 100


@pytest.mark.parametrize("seed", range(2, 8))
def test_power_cuts_with_some_luck(tmp_path: Path, record_property: Record, seed: int) -> None:
    (tmp_path / "disk").mkdir()
    disk = LossyDisk(tmp_path / "disk")
    left: list[Path] = []
    chance = random.Random(seed)  # noqa: S311
    with disk.recording(lambda: left.append(disk.cut(tmp_path / f"cut-{len(left)}", chance))):
        publish(Store(str(disk.root / "store")), "5", checkpoints=4)
    found = [check_left(Store(str(folder / "store"))) for folder in left]
    disk.close()
    assert found[-1][0]
    record_property("cuts", len(found))


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_kill_points(tmp_path: Path, record_property: Record, seed: int) -> None:
    """A hundred for each seed."""
    done = subprocess.run(
        [
            sys.executable,
            str(HERE.parent / "pipeline/crash_points.py"),
            str(tmp_path),
            "100",
            str(seed),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    record_property("points", cases)
    assert [case for case in cases if not case["ok"]] == []
    assert (done.returncode, len(cases)) == (0, 100)
