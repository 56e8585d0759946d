"""Samples of what a worker uses."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.worker import system
from pipeline.worker.system import SystemSampler

EATING = "data = bytearray(200_000_000); print(1, flush=True)\nwhile True: sum(range(1000))"


def sampled(seconds: float, *, gpus: bool = False) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    with SystemSampler(events.append, gpus=gpus):
        time.sleep(seconds)
    assert {event["type"] for event in events} == {"system"}
    return [event["values"] for event in events]


def test_even_the_shortest_stage_has_a_sample() -> None:
    (values,) = sampled(0)
    assert values["system/memory_bytes"] > 2**20
    assert set(values) == {"system/cpu_percent", "system/load_percent", "system/memory_bytes"}


def test_samples_are_taken_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "INTERVAL_S", 0.05)
    threads = threading.active_count()
    assert len(sampled(0.3)) >= 3
    assert threading.active_count() == threads


def test_what_children_use_counts() -> None:
    (before,) = sampled(0.2)
    child = subprocess.Popen([sys.executable, "-c", EATING], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        (values,) = sampled(0.6)
    finally:
        child.kill()
        child.communicate()
    assert values["system/memory_bytes"] - before["system/memory_bytes"] > 190_000_000
    assert values["system/cpu_percent"] > 10
    assert values["system/load_percent"] > 100 * 0.1 / (os.cpu_count() or 1)


@pytest.mark.parametrize("answer", ["echo 37, 100; echo 80, 50", "exit 9", "echo '[N/A], 3'"])
def test_gpus_are_asked_for_where_a_stage_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{answer}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    (values,) = sampled(0, gpus=True)
    assert "--id=2,3" in (tmp_path / "asked").read_text()
    found = {name: value for name, value in values.items() if "gpu" in name}
    expected = {"system/gpu_percent": 80, "system/gpu_memory_bytes": 150 * 2**20}
    assert found == (expected if answer.startswith("echo 37") else {})
    sampled(0)
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
