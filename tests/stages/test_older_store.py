"""A store of an earlier version is used as it is, once its code is accepted as equivalent.

The store in fixtures/ was made before the runner had folders and the library options: a small
network on the digits, four methods' estimates, and the models pruned by them.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from toy_runs import ROOT

STORE = Path(__file__).parent / "fixtures" / "older_store.tar.xz"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with tarfile.open(STORE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def fls(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_older_store_is_used_as_it_is_once_its_code_is_accepted(older: Path) -> None:
    assert fls(older, "verify").endswith("no damage.\n")
    (run,) = json.loads(fls(older, "status", "--json"))
    assert (run["state"], run["counts"]) == ("done", {"done": 10})
    planned = fls(older, "plan")
    assert "10 of 10 cells to run." in planned
    assert "cells run for changes of code alone" in planned
    accepted = fls(older, "accept", "--why", "a newer version")
    assert accepted == "Accepted for 10 cells of all stages.\n"
    assert "0 of 10 cells to run." in fls(older, "plan")
    rows = json.loads(fls(older, "results", "--json"))
    assert len(rows) == 5
    assert {row["method"] for row in rows} == {"dense", "fishleg", "obs", "kfac", "magnitude"}
    made = fls(
        older, "run", "--executor", "local", "--tracking", "jsonl", "--set", "oneshot.sparsity=0.7"
    )
    assert "of 10 cells to run" in made and "5 cached" in made  # the older estimates prune
