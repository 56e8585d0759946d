"""Numbers in README.md and docs/comparison.md are those of the committed results."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.harness import claims
from benchmarks.harness.committed import Committed
from benchmarks.harness.pages import PAGES, PARTS, filled
from benchmarks.harness.report import RESULTS

PART = re.compile(r"<!-- results: (\w+) -->.*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`|^ {4}.*$", re.DOTALL | re.MULTILINE)
VERSIONS = {"3.11", "2.0"}  # of Python, and of the licence


@pytest.fixture(scope="module")
def committed() -> Committed:
    return Committed(RESULTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_what_the_results_give(page: Path, committed: Committed) -> None:
    text = page.read_text("utf-8")
    assert filled(text, committed) == text, "run `make results`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_measured_number_is_outside_the_parts_that_results_give(page: Path) -> None:
    """A decimal fraction, a number of points or minutes, or a percentage with decimals."""
    prose = CODE.sub("", PART.sub("", page.read_text("utf-8")))
    fractions = {*re.findall(r"\d+\.\d+", prose)} - VERSIONS
    assert fractions == set()
    assert not re.findall(r"\d+ (?:%|points|epochs|seeds)", prose)


def test_every_part_is_in_a_page() -> None:
    used = {name for page in PAGES for name in PART.findall(page.read_text("utf-8"))}
    assert used == {*PARTS}


def test_an_unknown_part_is_an_error(committed: Committed) -> None:
    with pytest.raises(KeyError, match="missing"):
        filled("<!-- results: missing -->\n<!-- end -->", committed)


def changed(tmp_path: Path, cell: str, accuracy: float) -> Committed:
    """Return the results with another accuracy of one estimator's row."""
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "estimators" / f"{cell}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": accuracy}))
    return Committed(tmp_path / "results")


def test_a_sentence_follows_the_results(tmp_path: Path, committed: Committed) -> None:
    before = claims.best_one_step(committed)
    highest = re.findall(r"(\d\.\d) \((\d+\.\d+)", before)
    table = committed.one_step("estimators", "resnet20")
    for sparsity, accuracy in highest:
        column = [line[float(sparsity)].mean for line in table.values() if float(sparsity) in line]
        assert accuracy == f"{max(column):.2f}"
    after = changed(tmp_path, "magnitude[sparsity=0.9]", 99.55)
    assert "magnitude at 0.9 (99.55" in claims.best_one_step(after)


def test_the_training_that_refinement_is_follows_from_the_pipeline(committed: Committed) -> None:
    steps = [100, 150, 250, 400, 500, 800, 400, 800]
    assert committed.params("resnet20", "refined")["refinement"]["steps"] == steps
    told = claims.distillation(committed)
    assert f"{sum(steps):,} steps of Adam" in told
    assert f"over {128 * sum(steps):,} images" in told


def test_the_costs_are_means_of_the_rows(committed: Committed) -> None:
    rows = [
        json.loads(path.read_text())["cpu_seconds"]
        for path in (RESULTS / "resnet20").glob("refined_at*sparsity=0.9].json")
    ]
    assert len(rows) == 3
    assert f"takes {sum(rows) / 180:.0f} minutes" in claims.costs(committed)


def test_sentences_about_eigen_are_the_same_under_its_earlier_and_its_present_name(
    tmp_path: Path, committed: Committed
) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    for path in (tmp_path / "results").glob("*/*.json"):
        row = json.loads(path.read_text())
        if (row.get("method"), row.get("structure")) in {("fishleg", "eigen"), ("eigen", None)}:
            earlier = row["method"] == "fishleg"
            names = ("eigen", None) if earlier else ("fishleg", "eigen")
            path.write_text(json.dumps({**row, "method": names[0], "structure": names[1]}))
    other = Committed(tmp_path / "results")
    for sentence in (
        claims.best_one_step,
        claims.learned_one_step,
        claims.refinement_gain,
        claims.costs,
        claims.chita,
    ):
        assert sentence(other) == sentence(committed)
    for name in ("resnet20", "mlpnet", "estimators", "digits"):
        assert {*other.summary(name).sections} == {*committed.summary(name).sections}
        for section, lines in committed.summary(name).sections.items():
            assert {*other.section(name, section)} == {*lines}
