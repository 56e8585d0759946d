"""A store made when the digests of code were made by another rule."""

import hashlib
from pathlib import Path
from typing import Any

from test_worker import start_task
from toy_runs import fls, last_run, ran, run_here, write_spec

from pipeline.planning.keys import _hash, explain
from pipeline.store.checksum import verified, with_checksum
from pipeline.worker.worker import run_task

STAGES = """
    start: {uses: start, params: {value: 10}}
    apply: {uses: apply, inputs: {number: start}, params: {operation: plus}}
"""
RULE_CHANGED = "the rule for code digests changed (1 -> 2); `fls accept` keeps the results"


def age_store() -> None:
    """Make the store what an earlier version had written: other digests, so other keys."""
    path = Path(f".fls/runs/{last_run().run_id}/plan.json")
    plan = verified(path.read_bytes())
    keys: dict[str, str] = {}
    for entry in sorted(plan["cells"].values(), key=lambda e: len(e["ingredients"]["inputs"])):
        made = entry["ingredients"]
        del made["rule"], made["names"]["unchecked"]
        made["code"] = {m: hashlib.sha256(d.encode()).hexdigest() for m, d in made["code"].items()}
        made["inputs"] = {name: [keys[k] for k in found] for name, found in made["inputs"].items()}
        new, old = entry["key"], _hash(made)
        keys[new] = entry["key"] = old
        folder = Path(f".fls/stages/{new}").rename(f".fls/stages/{old}")
        if (file := folder / "manifest.json").exists():
            manifest: dict[str, Any] = verified(file.read_bytes())
            file.write_bytes(with_checksum({**manifest, "key": old, "ingredients": made}))
    path.write_bytes(with_checksum(plan))


def test_its_results_are_kept_by_accepting_and_the_plan_says_so(toy: Path) -> None:
    write_spec(STAGES)
    assert run_here()[0] == 0
    age_store()
    _, output, _ = fls("plan", "--why")
    assert f"start: run: {RULE_CHANGED}" in output
    assert f"apply: run: {RULE_CHANGED}" in output
    assert "code of" not in output
    assert "\n2 cells run because a newer rule makes the digests of their code. `fls " in output
    assert fls("accept", "start", "apply", "--why", "the same code")[0] == 0
    assert "Nothing to do" in run_here()[1]
    assert fls("verify")[0] == 0
    assert ran() == {"start": 1, "apply": 1}
    # From here on, what changes is named again.
    stages = Path("toy/stages.py")
    stages.write_text(stages.read_text() + "\nNEW = 1\n")
    assert run_here(overrides=["start.value=11"])[0] == 0
    _, output, _ = fls("plan", "--why", "--set", "start.value=12")
    assert "rule" not in output


def test_a_run_that_began_by_the_earlier_rule_goes_on_once_accepted(toy: Path) -> None:
    write_spec(STAGES + "    bad: {uses: fail, params: {counter: counter, until: 1}}\n")
    assert run_here()[0] == 1
    age_store()
    code, _, errors = fls("resume", "last")
    assert code == 2
    assert f"{RULE_CHANGED}: start, apply, bad" in errors
    assert "`fls accept start apply bad --why '...'" in errors
    assert fls("accept", "start", "apply", "bad", "--why", "the same code")[0] == 0
    assert "rule" not in fls("resume", "last")[1]
    assert ran()["start"] == ran()["apply"] == 1


def test_what_else_has_changed_is_said_too() -> None:
    before = {
        "stage": "s", "code": {"m": "a"}, "params": {"x": 1}, "files": {}, "data": {},
        "inputs": {}, "names": {"inputs": {}}, "generation": 0,
    }  # fmt: skip
    after = {**before, "code": {"m": "b"}, "rule": 2, "params": {"x": 2}}
    assert explain(before, after) == ["params.x: 1 -> 2", RULE_CHANGED]
    assert explain(after, {**after, "code": {"m": "c"}}) == ["code of m changed"]
    accepted = {**after, "code": {"m": "a"}, "accepted": {"code": {"m": "b"}}}
    assert explain(accepted, {**after, "code": {"m": "c"}}) == ["code of m changed"]
    assert explain({**before, "params": {"x": 2}}, accepted) == []


def test_a_worker_of_another_version_says_so(toy: Path) -> None:
    outcome = run_task(start_task(ingredients={"stage": "start", "code": {}, "rule": 1}))
    assert outcome["error"]["user"]
    assert "different versions" in outcome["error"]["message"]
