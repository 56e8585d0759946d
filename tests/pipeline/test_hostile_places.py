"""A place where nothing can be is told in one paragraph, whichever command comes upon it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import ROOT, fls, run_here, write_spec

ONE = "start: {uses: start, params: {value: 1}}"
RUN = ("run", "--executor", "local", "--tracking", "jsonl")
COMMANDS = [
    RUN,
    ("plan",),
    ("validate",),
    ("graph",),
    ("list",),
    ("status",),
    ("status", "last"),
    ("logs", "start"),
    ("results",),
    ("export", "pipeline.yaml", "start", "out"),
    ("sync",),
    ("resume", "last"),
    ("stop", "last"),
    ("gc",),
    ("verify",),
    ("accept", "start", "--why", "so"),
]
WITHOUT_A_STORE = {"validate", "graph", "list"}
PLACES = {
    "below proc": "/proc/nope/x",
    "read only": "/sys/nope/x",
    "a device": "/dev/null",
    "below a device": "/dev/null/x",
    "a file": "file",
    "below a file": "file/deeper/x",
    "too long": "x" * 300,
    "too deep": "/".join(["x" * 200] * 30),
    "NUL": '"a\\0b"',
    "as URL": "file:///proc/nope/x",
    "no scheme": "://x",
}


def in_one_paragraph(*command: str) -> int:
    """Run a command; return its exit code, after a look at what it said of a mistake."""
    code, _, errors = fls(*command)
    assert code in {0, 1, 2}
    assert (errors != "") == (code != 0)
    assert "Traceback" not in errors and "[Errno" not in errors, errors
    return code


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_place_that_can_be_no_store_is_told(toy: Path, place: str) -> None:
    Path("file").write_text("not a folder")
    write_spec(ONE, storage=place)
    codes = {" ".join(command): in_one_paragraph(*command) for command in COMMANDS}
    assert all(codes[name] == 0 for name in WITHOUT_A_STORE if "\\0" not in place)
    assert codes[" ".join(RUN)] in {1, 2}
    assert all(codes[name] for name in ("gc", "verify", "sync", "resume last", "logs start"))
    assert not Path("out").exists()


@pytest.mark.parametrize("file", [".", "/dev/zero", "a\0b", "x" * 300, "nowhere.yaml", "toy/x/y"])
def test_a_file_that_can_be_no_pipeline_is_told(toy: Path, file: str) -> None:
    for command, *_ in COMMANDS:
        if command in {"run", "plan", "validate", "graph", "results", "list"}:
            assert in_one_paragraph(command, file) == 2
        elif command == "export":
            assert in_one_paragraph(command, file, "start", "out") == 2
    for command in ("status", "sync", "gc --file", "logs start"):
        name, *more = command.replace(" --file", "").split()
        given = [file] if name == "gc" else ["--file", file]
        assert in_one_paragraph(name, *more, *given) == 2


@pytest.mark.parametrize("place", ["/proc/nope/x", "file", "file/x", "a\0b", "x" * 300])
def test_an_export_to_where_nothing_can_be_is_told(toy: Path, place: str) -> None:
    Path("file").write_text("not a folder")
    write_spec(ONE)
    assert run_here()[0] == 0
    assert in_one_paragraph("export", "pipeline.yaml", "start", place) in {1, 2}


@pytest.mark.parametrize("place", ["/proc/nope", "file", "/sys/nope"])
def test_json_lines_where_none_can_be_are_told(toy: Path, place: str) -> None:
    write_spec(ONE)
    Path("file").write_text("not a folder")
    Path("tracking").symlink_to(Path(place).absolute())
    code, output, errors = fls(*RUN)
    assert code in {0, 1}
    assert "Traceback" not in output + errors
    assert "tracking" in output + errors


def test_an_address_that_mlflow_does_not_know_is_told_however_quick_the_run_is(toy: Path) -> None:
    write_spec(ONE)
    done = subprocess.run(  # without -W error: MLflow's import warns
        [sys.executable, "-m", "pipeline", "run", "--executor", "local"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "nonsense://x"},
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert "Tracking does not work (PipelineError: MLflow at nonsense://x" in said
    assert "Traceback" not in said
