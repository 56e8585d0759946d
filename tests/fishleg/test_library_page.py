"""Every code block of docs/library.md runs, in the page's order."""

import inspect
import re
from pathlib import Path

import fishleg

PAGE = (Path(__file__).resolve().parents[2] / "docs/library.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/library.md, block {number}", "exec"), names)  # noqa: S102
    assert len(BLOCKS) == PAGE.count("```") / 2 == 7
    assert "all prunable" in capsys.readouterr().out
    assert names["report"].removed == 2131  # floor(0.9 * 2368 + 1/2)


def test_a_score_takes_five_lines():
    (score,) = (block.split("\n\n\n")[0] for block in BLOCKS if "def within_row" in block)
    assert len(score.splitlines()) <= 5


def test_the_table_of_keywords_is_that_of_prune():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ", PAGE, re.MULTILINE)
    told = set(re.findall(r"\w+", " ".join(rows)))
    taken = set(inspect.signature(fishleg.prune).parameters)
    assert told <= taken
    assert taken - told == {"model", "data", "sparsity", "batch_size", "calling", "progress"}
