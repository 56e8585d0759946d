"""Environment variables are declared, checked and listed in one place."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_runs import ROOT, fls, write_spec

from pipeline.base.errors import BadInput
from pipeline.base.variables import LEASE_S, VARIABLES, check_variables
from pipeline.worker.worker import run_task

REFUSED = [
    *(("FLS_LEASE_S", text) for text in ("0", "-1", "1e-9", "nan", "inf", "1e9", "soon", "30s")),
    *(("FLS_CACHE_BYTES", text) for text in ("20 GB", "-1", "1e9", "9" * 40, "9" * 5000)),
    ("CUDA_VISIBLE_DEVICES", "0;reboot"),
    *((variable.name, "a\x1b]0;owned\x07") for variable in VARIABLES if variable.name[:3] != "RAY"),
    ("RAY_ADDRESS", "a\nb"),
]


def read_in(path: Path) -> Iterator[str]:
    """Yield the names of the environment variables that a module reads."""
    for node in ast.walk(ast.parse(path.read_text())):
        name = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"os.environ.get", "os.getenv"}:
            name = node.args[0]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            name = node.slice if ast.unparse(node.value) == "os.environ" else None
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            name = node.left
        if name is not None:
            yield ast.literal_eval(name) if isinstance(name, ast.Constant) else ast.unparse(name)


def test_every_variable_that_is_read_is_declared() -> None:
    read = {
        (path.relative_to(ROOT).as_posix(), name)
        for package in ("pipeline", "stages", "fishleg")
        for path in (ROOT / package).rglob("*.py")
        for name in read_in(path)
    }
    elsewhere = {
        ("pipeline/executors/machine.py", "CUDA_DEVICES.name"),  # where an empty one means no GPU
        ("pipeline/executors/ray_jobs.py", "name"),  # what it hides from Ray, and puts back
        ("pipeline/executors/ray.py", "PYTHONPATH"),  # which is Python's, and put back
        ("pipeline/base/search_path.py", "PYTHONPATH"),  # the same
        ("pipeline/executors/ray_token.py", "RAY_AUTH_MODE"),  # which are Ray's, and completed
        ("pipeline/executors/ray_token.py", "RAY_AUTH_TOKEN_PATH"),
        ("stages/data/place.py", "FISHLEG_DATA"),  # a stage knows nothing of the runner
    }
    assert read - {("pipeline/base/variables.py", "self.name")} <= elsewhere


def test_help_lists_every_variable(toy: Path) -> None:
    code, output, _ = fls("--help")
    assert code == 0
    for variable in VARIABLES:
        assert f"  {variable.name}: {variable.purpose}\n" in output


@pytest.mark.parametrize(("name", "text"), REFUSED, ids=[f"{n}={t[:12]!r}" for n, t in REFUSED])
def test_a_variable_that_holds_something_else_is_refused_before_anything_begins(
    toy: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    monkeypatch.setenv(name, text)
    for command in (("run", "--executor", "local"), ("status",), ("gc",), ("validate",)):
        code, output, errors = fls(*command)
        assert (code, output) == (2, "")
        assert errors.startswith(f"{name} is ")
        assert "; expected " in errors
        assert errors.endswith("Correct it, or unset it.\n")
        assert len(errors) < 400
        assert "\x1b" not in errors
    assert not Path(".fls").exists()
    assert fls("run", "--help")[0] == 0


def test_all_variables_that_are_wrong_are_told_at_once(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLS_LEASE_S", "0")
    monkeypatch.setenv("FLS_CACHE_BYTES", "much")
    with pytest.raises(BadInput, match=r"(?s)FLS_LEASE_S is '0'.*FLS_CACHE_BYTES is 'much'"):
        check_variables()


def test_a_variable_that_is_empty_counts_as_unset(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable.name, "")
        assert variable.read() == variable.default
    write_spec("start: {uses: start, params: {value: 1}}")
    assert fls("run", "--executor", "local", "--tracking", "jsonl")[0] == 0
    assert Path(".fls/storage.json").exists()


def test_a_worker_of_another_node_checks_its_own(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLS_LEASE_S", "0")
    outcome = run_task({"storage": ".fls"})  # type: ignore[typeddict-item]
    assert outcome["status"] == "failed"
    assert outcome["error"]["user"]
    assert "FLS_LEASE_S is '0'" in json.dumps(outcome["error"])


def test_a_lease_may_be_short_but_not_so_that_heartbeats_are_all_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for text in ("1", "30", "86400", "2.5"):
        monkeypatch.setenv("FLS_LEASE_S", text)
        assert LEASE_S.read() == float(text)
