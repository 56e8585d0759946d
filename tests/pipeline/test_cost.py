"""What a stage's work is said to cost."""

import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.worker.cost import CostMeter

MEGABYTE = 2**20


def touch(megabytes: int) -> None:
    with mmap.mmap(-1, megabytes * MEGABYTE) as memory:
        memory.write(b"1" * len(memory))


def test_processor_time_is_that_of_the_process_and_its_children() -> None:
    meter = CostMeter()
    time.sleep(0.2)
    idle = meter.read()
    assert idle["seconds"] >= 0.2 > idle["cpu_seconds"] + 0.1
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert meter.read()["cpu_seconds"] > idle["cpu_seconds"] + 0.05


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux resets the mark")
def test_the_memory_of_earlier_work_in_the_process_is_not_counted() -> None:
    meter = CostMeter()
    touch(64)
    large = meter.read()["peak_bytes"]
    again = CostMeter()
    small = again.read()["peak_bytes"]
    assert large > small + 60 * MEGABYTE
    touch(16)
    assert again.read()["peak_bytes"] < large
