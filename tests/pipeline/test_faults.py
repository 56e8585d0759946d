"""Eight cases of the fault matrix, on a cluster of three Ray nodes; `make test-faults` has all."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.matrix import Bench

CASES = [
    "driver,kill,prune_gradual",
    "driver,term,pretrain",
    "driver,pause,compare",
    "worker,kill,curvature",
    "worker,term,finetune",
    "raylet,kill,evaluate",
]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="f-") as folder:  # short, for it holds sockets
        made = Bench(Path(folder), Path(folder, "log"))
        try:
            made.prepare()
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("case", CASES)
def test_a_fault_changes_no_byte_and_repeats_nothing_that_was_complete(
    bench: Bench, case: str
) -> None:
    found = bench.run(case)
    assert found["problems"] == [], (found, bench.log.read_text()[-4000:])
