"""Benchmarks that are modules: finished cells stay finished, whatever happens to the others."""

import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.harness.documents import read_cells
from benchmarks.harness.report import write_report
from benchmarks.harness.scripts import run_script
from benchmarks.harness.suite import Benchmark, find_benchmark, list_benchmarks, matches
from pipeline.base.errors import BadInput

TOY = """
from pathlib import Path

TITLE = "Squares"

def cells():
    return {f"square[of={n}]": {"of": n} for n in (2, 3, 4)}

def run_cell(params, folder):
    count = Path("ran") / str(params["of"])
    count.parent.mkdir(exist_ok=True)
    count.write_text(count.read_text() + "x" if count.exists() else "x")
    kept = folder / "half"
    if params["of"] == 3 and not kept.exists():
        kept.write_text("half way")
        raise RuntimeError("cut off in the middle")
    return {"square": params["of"] ** 2, "went_on": kept.exists()}

def report(results, figures):
    return "\\n".join(f"{cell}: {one['result']['square']}" for cell, one in results.items())
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHLEG_BENCHMARKS_STORE", "store")
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "toy.py").write_text(TOY)
    return find_benchmark("toy", tmp_path / "suite")


def run(toy: Benchmark, *only: str) -> dict[str, str]:
    return run_script(toy, Path("results"), only, Console(quiet=True))


def times_run() -> dict[str, int]:
    return {path.name: len(path.read_text()) for path in Path("ran").iterdir()}


def test_an_interrupted_run_goes_on_without_repeating_what_is_finished(toy: Benchmark) -> None:
    assert run(toy) == {"square[of=3]": "RuntimeError: cut off in the middle"}
    assert list(read_cells(Path("results"), "toy")) == ["square[of=2]", "square[of=4]"]
    assert run(toy) == {}
    assert times_run() == {"2": 1, "3": 2, "4": 1}
    found = read_cells(Path("results"), "toy")["square[of=3]"]
    assert found["result"] == {"square": 9, "went_on": True}
    assert found["params"] == {"of": 3}
    assert found["peak_bytes"] > 2**20
    environment = Path("results/environments") / f"{found['environment']}.json"
    assert json.loads(environment.read_text())["threads"] == 1
    assert run(toy) == {}
    assert sum(times_run().values()) == 4
    write_report(Path("report.md"), Path("results"), toy.path.parent)
    assert "## Squares\n\nsquare[of=2]: 4\nsquare[of=3]: 9\n" in Path("report.md").read_text()


def test_a_run_that_is_out_of_time_keeps_the_folder_of_the_cell_at_hand(toy: Benchmark) -> None:
    slow = TOY.replace("raise RuntimeError", "import time; time.sleep(60)\n        raise OSError")
    toy.path.write_text(slow)
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(toy, Path("results"), ["*of=3]"], Console(quiet=True), 4.0)
    toy.path.write_text(TOY)
    assert run(toy, "*of=3]") == {}
    assert read_cells(Path("results"), "toy")["square[of=3]"]["result"]["went_on"]


def test_other_parameters_are_another_result(toy: Benchmark) -> None:
    run(toy, "*of=2]")
    assert times_run() == {"2": 1}
    toy.path.write_text(TOY.replace('{"of": n}', '{"of": n, "new": 1.5}'))
    run(toy, "*of=2]")
    assert times_run() == {"2": 2}


def test_a_pattern_fits_whole_names() -> None:
    assert matches(["a[b=*]"], "a[b=1,c=2]")
    assert not matches(["a[b=1"], "a[b=1,c=2]")
    assert matches(["c", "a[b=*]"], "a[b=1,c=2]")
    assert matches([], "a[b=1,c=2]")


def test_an_unknown_benchmark_is_an_error_that_names_the_nearest(toy: Benchmark) -> None:
    assert [one.name for one in list_benchmarks(toy.path.parent)] == ["toy"]
    with pytest.raises(BadInput, match="no benchmark 'toys'.*toy"):
        find_benchmark("toys", toy.path.parent)
