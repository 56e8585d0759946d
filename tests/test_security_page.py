"""docs/security.md names tests that are there, and each of its findings names one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
