"""What is changed while a run is on is never published under a key that stands for what it was.

A stage takes its time; meanwhile changes what a second one after it uses. The second one fails once
and names it. Put back, and started again, the run is brought to its end, with the right result.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from toy_runs import fls, last_run, start_fls, wait_for

from pipeline.base.states import CellState
from pipeline.planning.planner import make_plan
from pipeline.spec.load import load_spec
from pipeline.store.store import Store
from stages.models.digits_resnet import digits_resnet

SLOW = "slow: {uses: slow, params: {steps: 30, delay_s: 0.1}}"
AFTER = "after: {uses: add, inputs: {number: slow}}"  # so that `slow` is the first
USERS = {
    "code": "{uses: apply, inputs: {number: slow}, params: {operation: times}, retries: 2}",
    "file": "{uses: read, params: {path: number.txt}, retries: 2}",
    "checkpoint": (
        "{uses: import_checkpoint, params: {dataset: digits, model: digits_resnet, model_args: "
        "{width: 4, hidden: 16}, path: net.safetensors}, retries: 2}"
    ),
}
VICTIMS = {"code": "toy/operations/times.py", "file": "number.txt", "checkpoint": "net.safetensors"}


def write_network(seed: int) -> bytes:
    torch.manual_seed(seed)
    save_file(digits_resnet(10, width=4, hidden=16).state_dict(), "net.safetensors")
    return Path("net.safetensors").read_bytes()


def lay_out(victim: str) -> tuple[bytes, bytes]:
    """Write a pipeline; return what the victim holds, and what it is changed to."""
    Path("pipeline.yaml").write_text(
        "name: promises\nplugins: [toy, stages.catalogue]\nstorage: .fls\nstages:\n"
        f"  {SLOW}\n  {AFTER}\n  user: {USERS[victim]}\n"
    )
    Path("number.txt").write_text("3")
    other, right = write_network(1), write_network(0)
    before = Path(VICTIMS[victim]).read_bytes()
    if victim == "checkpoint":
        return right, other
    return before, before.replace(b"*", b"+").replace(b"3", b"4")


def run(executor: str) -> list[str]:
    return ["run", "--executor", executor, "--tracking", "jsonl", "--max-parallel", "1"]


@pytest.mark.parametrize("executor", ["local", "ray"])
@pytest.mark.parametrize("victim", list(VICTIMS))
def test_what_is_changed_on_the_way_is_not_published(
    toy: Path, monkeypatch: pytest.MonkeyPatch, victim: str, executor: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    right, wrong = lay_out(victim)
    keys = {
        one.cell.name: one.key
        for one in make_plan(load_spec(Path("pipeline.yaml")), Store(".fls")).cells
    }
    driver = start_fls(*run(executor))
    wait_for(lambda: driver.poll() is not None or Store(".fls").attempts(keys["slow"]), 120)
    Path(VICTIMS[victim]).write_bytes(wrong)
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1, output + errors
    user = last_run().cells["user"]
    assert user.state is CellState.FAILED
    assert Path(VICTIMS[victim]).name in user.error["message"]
    assert "start the run again" in user.error["message"]
    assert Store(".fls").attempts(keys["user"]) == [1]
    assert Store(".fls").manifest(keys["user"]) is None

    Path(VICTIMS[victim]).write_bytes(right)
    driver = start_fls(*run(executor))
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, output + errors
    assert {name: status.key for name, status in last_run().cells.items()} == keys
    assert last_run().cells["slow"].state is CellState.CACHED
    assert fls("verify")[0] == 0
    if victim == "checkpoint":
        folder = Store(".fls").fetch(keys["user"], "model")
        found = load_file(folder / "model.safetensors")
        wanted = load(right)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    else:
        number = json.loads(
            (Store(".fls").fetch(keys["user"], "number") / "number.json").read_text()
        )
        slow = json.loads((Store(".fls").fetch(keys["slow"], "number") / "number.json").read_text())
        assert number["number"] == (2 * slow["number"] if victim == "code" else 3)
