"""docs/security.md names tests that are there; rules of security are passed over with a reason."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
REASONED = re.compile(r"# noqa: S\d+(, S\d+)* - \w")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def rows() -> list[list[str]]:
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    table = text[text.index("| finding | test |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_each_finding_has_a_test_and_a_line_of_defence() -> None:
    assert len(rows()) > 5
    for row in rows():
        assert len(row) == 3, row
        assert TEST.search(row[1]), row
        assert row[2], row


def test_the_tests_are_there() -> None:
    for row in rows():
        for file, name in TEST.findall(row[1]):
            source = (ROOT / file).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in source, f"{file}::{name}"


def test_no_rule_of_security_is_passed_over_without_a_reason() -> None:
    passed_over = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in ("pipeline", "fishleg", "stages")
        for path in sorted((ROOT / package).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"# (noqa: S|nosec|ruff: noqa)", line)
    ]
    assert passed_over, "the pattern finds none"
    assert [line for line in passed_over if not REASONED.search(line)] == []
