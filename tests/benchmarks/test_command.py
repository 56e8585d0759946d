"""The command line of the benchmarks."""

import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_benchmarks_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "list") == 0
    assert {"estimators", "resnet18"} <= set(capsys.readouterr().out.split())


def test_a_users_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "run", "estimatrs", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err.strip().endswith("(did you mean 'estimators'?).")
