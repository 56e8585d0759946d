"""Disks that fail for a while, workers that not even SIGKILL ends, and tools that hang.

The faults are the kernel's own: strace lets system calls of the running processes fail with EIO or
ENOSPC, and a frozen file system keeps who writes to it in state D.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from test_worker import plugin
from toy_runs import checkpoint_exists, fls, last_run, numbers, start_fls, wait_for, write_spec

from pipeline.base.states import CellState, RunState
from pipeline.store.store import Store

STEPS = 40
SLOW = f"slow: {{uses: slow, params: {{steps: {STEPS}, delay_s: 0.1, checkpoint_every: 5}}}}"
RUN = ("run", "--executor", "local", "--tracking", "jsonl")
# What writes to a store, and nothing else that these processes do.
WRITES = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,mkdir,mkdirat"


def children(pid: int) -> list[int]:
    """Return the process and all that it has started."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "ESTALE"])
@pytest.mark.parametrize("whose", ["driver", "worker"])
def test_a_disk_that_fails_for_a_while_only_delays_a_run(
    toy: Path, monkeypatch: pytest.MonkeyPatch, whose: str, error: str
) -> None:
    assert shutil.which("strace"), "install Debian's strace"
    monkeypatch.setenv("FLS_LEASE_S", "2")
    write_spec(SLOW)
    driver = start_fls(*RUN)
    wait_for(checkpoint_exists, 60)
    mine, *others = children(driver.pid)
    victims = [mine] if whose == "driver" else others
    chosen = [f"--attach={pid}" for pid in victims]
    trace = Path("trace.txt")
    strace = subprocess.Popen(
        ["strace", "-fqo", trace, "-e", f"trace={WRITES}", "-e", f"inject={WRITES}:error={error}"]
        + chosen
    )
    time.sleep(4)  # two leases
    strace.send_signal(signal.SIGINT)
    strace.wait(30)
    output, errors = driver.communicate(timeout=120)
    assert trace.read_text().count("(INJECTED)") > 3
    assert driver.returncode == 0, output + errors
    assert last_run().observed_state() is RunState.DONE
    assert fls("verify")[0] == 0
    # What a checkpoint could not be written for is lost with its attempt, and with nothing else.
    assert len(Store(".fls").attempts(last_run().cells["slow"].key)) <= 2
    number = 0
    for _ in range(STEPS):
        number = (number * 75 + 74) % 65537
    assert numbers() == {"slow": number}


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system in which every write hangs, until `thaw`."""
    image, folder = tmp_path / "image", tmp_path / "frozen"
    folder.mkdir()
    subprocess.run(["truncate", "-s", "20M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        subprocess.run(["fsfreeze", "--freeze", folder], check=True)
        yield folder
    finally:
        thaw(folder)
        subprocess.run(["umount", "--lazy", folder], check=True)


def thaw(folder: Path) -> None:
    subprocess.run(["fsfreeze", "--unfreeze", folder], stderr=subprocess.DEVNULL)


@pytest.fixture
def hanging(toy: Path, frozen: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a pipeline of which one stage writes to a frozen disk, and another does not."""
    monkeypatch.setenv("FLS_LEASE_S", "2")
    plugin(
        f"open('pid', 'w').write(str(os.getpid()))\nopen('{frozen}/x', 'w').write('x')\n"
        "save_number(ctx, 1)"
    )
    catalogue = Path("toy/catalogue.py")
    catalogue.write_text(catalogue.read_text().replace('"toy.slow:fail"', '"toy.extra:stage"'))
    write_spec("hung: {uses: fail, timeout_s: 3}\nother: {uses: start, params: {value: 5}}")
    yield frozen
    thaw(frozen)


def in_kernel() -> bool:
    pid = Path("pid").read_text() if Path("pid").exists() else ""
    return bool(pid) and " D " in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.parametrize("how", ["timeout", "SIGTERM", "SIGINT"])
def test_a_worker_that_the_kernel_holds_holds_no_run_up(hanging: Path, how: str) -> None:
    driver = start_fls(*RUN, "--max-parallel", "2")
    wait_for(in_kernel, 60)
    wait_for(lambda: last_run().cells["other"].state is CellState.DONE, 60)
    if how != "timeout":
        driver.send_signal(signal.Signals[how])
    output, errors = driver.communicate(timeout=60)
    assert in_kernel()
    said = output + errors
    assert re.search(rf"process {Path('pid').read_text()} does not end after SIGKILL", said), said
    assert driver.returncode == {"timeout": 1, "SIGTERM": 143, "SIGINT": 130}[how], said
    assert last_run().state is (RunState.FAILED if how == "timeout" else RunState.STOPPED)

    thaw(hanging)
    Path("pid").unlink()
    driver = start_fls("resume", "last")
    output, errors = driver.communicate(timeout=60)
    assert driver.returncode == 0, output + errors
    assert numbers() == {"hung": 1.0, "other": 5.0}
    assert fls("verify")[0] == 0


def test_a_tool_for_gpus_that_hangs_is_named_with_the_way_around_it(
    toy: Path, hanging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = toy / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho x > {hanging}/y\nexec sleep 600\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write_spec("other: {uses: start, params: {value: 5}}")
    driver = start_fls(*RUN)
    output, errors = driver.communicate(timeout=120)
    assert (driver.returncode, output) == (1, "")
    assert re.search(r"nvidia-smi gave no answer within 30 s, .*CUDA_VISIBLE_DEVICES", errors)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert fls(*RUN)[0] == 0
