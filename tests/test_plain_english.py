"""The product's texts avoid words that a native engineer would stumble over."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = ["fishleg", "stages", "pipeline", "docs", "experiments", "benchmarks"]
FILES = sorted(
    [
        *(
            path
            for place in PLACES
            for path in (ROOT / place).rglob("*")
            if path.suffix in {".py", ".md", ".yaml"} and path.name != "log.md"
        ),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.yaml"),
    ]
)
INSTEAD = {
    "anew": "again",
    "go on with": "resume, continue",
    "gone on with": "resumed",
    "heed": "obey, use, handle",
    "heeds": "obeys, uses, handles",
    "heeded": "obeyed, used, handled",
    "mend": "correct",
    "mends": "corrects",
    "mended": "corrected",
    "bear out": "support",
    "bears out": "supports",
    "nobody": "no one, or the subject itself",
    "whoever": "the subject itself",
    "dearest": "most expensive",
}
FOUND = re.compile(rf"(?<![\w`/])({'|'.join(INSTEAD)})(?![\w`/])", re.IGNORECASE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_text_has_no_word_of_another_style(path: Path) -> None:
    text = re.sub(r"`tests/[^`]*`", "", path.read_text(encoding="utf-8"))
    for number, line in enumerate(text.splitlines(), start=1):
        for word in FOUND.findall(line):
            raise AssertionError(f"{path}:{number}: {word!r}: write {INSTEAD[word.lower()]!r}")
