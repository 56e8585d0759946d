"""A committed result is not the end of its sweep: its grid would have to be extended."""

from pathlib import Path

import pytest

from benchmarks.harness.documents import read_cells
from benchmarks.harness.report import RESULTS
from benchmarks.harness.suite import list_benchmarks
from benchmarks.harness.sweeps import HIGHEST, best_of, choices_in, ends_of, next_value, search

# To be measured again: a line is removed when its row has a value inside the grid.
KNOWN = {*(Path(__file__).with_name("known_ends.txt").read_text("utf-8").splitlines())}


def test_no_committed_choice_is_an_end_of_its_grid() -> None:
    found = {
        end
        for benchmark in list_benchmarks()
        for cell, document in read_cells(RESULTS, benchmark.name).items()
        for end in ends_of(benchmark.name, cell, document)
    }
    assert found - KNOWN == set(), "extend the grid, and measure again"
    assert KNOWN - found == set(), "no longer an end: remove it from known_ends.txt"


@pytest.mark.parametrize(("best", "chosen"), [(3.0, 1.0), (1e-9, 1e-8), (1e9, HIGHEST)])
def test_a_search_leaves_the_grid_until_the_best_value_is_inside_or_at_a_limit(
    best: float, chosen: float
) -> None:
    """Scores rise towards `best`, as far as it is away in decades."""
    found = search([1e-3, 1e-2], lambda value: [-max(value / best, best / value)])
    scores = {value: score for value, (score,) in found.items()}
    assert best_of(scores) == pytest.approx(chosen)
    assert next_value(best_of(scores), list(scores)) is None
    assert len(scores) <= 12


def test_a_search_serves_several_places_and_scores_each_value_once() -> None:
    asked: list[float] = []

    def score(value: float) -> list[float]:
        asked.append(value)
        return [-abs(value - 1e-4), -abs(value - 0.1)]

    assert list(search([1e-3, 1e-2], score)) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
    assert len(asked) == len({*asked}) == 6


def test_the_choices_of_a_script_have_the_grid_beside_them_or_that_of_the_cell() -> None:
    nested = [{"damping": 0.1, "dampings": [0.1, 1.0]}, {"damping": 0.01}]
    document = {"params": {"dampings": [0.01, 0.1], "damping": 5.0}, "result": {"ways": nested}}
    assert list(choices_in(document)) == [
        ("result.ways[0]", 0.1, [0.1, 1.0]),
        ("result.ways[1]", 0.01, [0.01, 0.1]),
    ]


def test_results_of_every_kind_are_checked(tmp_path: Path) -> None:
    row = {"choices": {"curvature.damping": {"chosen": 0.1, "among": [0.01, 0.1]}}}
    assert ends_of("estimators", "new", row) == ["estimators/new curvature.damping"]
    assert ends_of("estimators", "best[x]", {"damping": 1e-6}) == ["estimators/best[x] damping"]
    assert ends_of("estimators", "dense", {"damping": None}) == []
