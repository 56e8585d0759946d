"""The ledger of the fault tests: what is done of the same code is not run again, torn or not."""

import json
from pathlib import Path

import pytest

from tests.faults.ledger import Ledger, newest, read_lines


def test_a_run_goes_on_after_a_kill_within_a_line(tmp_path: Path) -> None:
    path = tmp_path / "build" / "faults.jsonl"
    ledger = Ledger(path)
    assert ledger.plan(["a", "b", "c"]) == ["a", "b", "c"]
    ledger.write("a", 1.04, [])
    ledger.write("b", 2, ["other bytes"], hit="hit")
    with path.open("a") as file:
        file.write('{"case": "c", "ok": tr')
    again = Ledger(path)
    assert again.plan(["a", "b", "c"]) == ["b", "c"]
    assert again.was_lost("b")
    again.write("c", 1, [])
    again.write("b", 1, [])
    assert again.summarise() == 0
    assert Ledger(path).plan(["a", "b", "c"]) == []
    first, second, *_ = read_lines(path)
    code = first.pop("code")
    assert first == {"case": "a", "ok": True, "seconds": 1.0, "problems": []}
    assert second["hit"] == "hit"
    assert newest(read_lines(path), code)["b"]["ok"]


def test_other_code_counts_for_nothing_but_stays(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    path.write_text(json.dumps({"case": "a", "ok": True, "code": "other"}) + "\n")
    ledger = Ledger(path)
    assert ledger.plan(["a"]) == ["a"]
    ledger.write("a", 0, [])
    assert [line["code"] for line in read_lines(path)] == ["other", ledger.code]


def test_the_summary_names_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(tmp_path / "faults.jsonl", "a*")
    ledger.plan(["a1", "a2", "a3", "b"])
    ledger.write("a1", 0, [])
    ledger.write("a2", 0, ["one", "two"])
    ledger.note_broken("no cluster")
    capsys.readouterr()
    assert ledger.summarise() == 1
    said = capsys.readouterr().out
    assert "3 cases of code" in said
    assert said.endswith("2 lost\n  a2: one; two\n  a3: not run\n  no cluster\n")


def test_a_run_about_nothing_is_no_success(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "faults.jsonl", "misspelt").summarise() == 1
