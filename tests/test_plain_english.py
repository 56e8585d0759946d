"""The product's texts avoid words that a native engineer would stumble over."""

import re
from pathlib import Path

import pytest

from tests import module_tree

ROOT = Path(__file__).parent.parent
PLACES = ["fishleg", "stages", "pipeline", "docs", "experiments", "benchmarks"]
FILES = sorted(
    [
        *(
            path
            for place in PLACES
            for path in (ROOT / place).rglob("*")
            if path.suffix in {".py", ".md", ".yaml"}
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
    "dearer": "more expensive",
    "riddle": "question, open problem",
    "came of it": "the result",
    "as it lay": "unchecked",
    "without a word": "silently",
    "where it is that": "a sentence of its own",
    "by the clock": "wall-clock",
    "goes on": "resumes, continues",
    "go on": "resume, continue",
    "going on": "resuming, continuing",
    "gone on": "resumed, continued",
    "went on": "resumed, continued",
    "stands for": "means, represents",
    "stand for": "mean, represent",
    "whatever": "a noun",
    "what is there": "existing results, or another noun",
    "said once": "declared once, reported once",
    "told to end": "asked to stop",
    "told to stop": "asked to stop",
    "gets on": "progresses",
    "is at it": "is running it",
    "somebody": "a user, another process",
    "everybody": "every user",
    "anybody": "any user",
    "shot at": "hit by a fault",
    "behind a checkpoint": "after a checkpoint",
    "looked for": "searched",
    "looked into": "read",
    "made again": "computed again",
    "make again": "compute again",
    "makes it again": "computes it again",
    "hand it over": "pass it, submit it",
    "hands it over": "passes it, submits it",
    "handed over": "passed, submitted",
    "passed on": "forwarded",
    "passes on": "forwards",
    "goes along": "is included",
    "go along": "are included",
    "takes along": "includes",
    "leave behind": "omit",
    "leaves behind": "omits",
    "left behind": "omitted",
    "stay behind": "are omitted",
    "for want of": "for lack of",
    "to the same bits": "bit-identical",
    "at hand": "current, available",
    "so many": "the number itself",
    "out at once": "in flight, submitted at once",
    "dear": "expensive",
}


def words_found(path: Path, words: dict[str, str]) -> list[str]:
    """Return place, word and remedy of each listed word in a file but for the generated tree."""
    found = re.compile(rf"(?<![\w`/-])({'|'.join(words)})(?![\w`/])", re.IGNORECASE)
    text = re.sub(r"`tests/[^`]*`", "", path.read_text(encoding="utf-8"))
    if path == module_tree.PAGE:
        text = text.partition(module_tree.HEADING)[0]
    return [
        f"{path}:{number}: {word!r}: write {words[word.lower()]!r}"
        for number, line in enumerate(text.splitlines(), start=1)
        for word in found.findall(line)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_text_has_no_word_of_another_style(path: Path) -> None:
    assert words_found(path, INSTEAD) == []
