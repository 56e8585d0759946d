"""Which lines of a table a test tells from the best one, against values worked by hand."""

import math
from typing import Any

import numpy as np
import pytest

from stages.answers import Answers, pack, unpack
from stages.report.paired import bootstrap, compare, find_best, mcnemar, student, used_tests
from stages.report.summary import Lines, Point


def flags(*counts: int) -> tuple[Any, Any]:
    """Return the answers of two models: both right, first only, second only, both wrong."""
    first = np.repeat([True, True, False, False], counts)
    second = np.repeat([True, False, True, False], counts)
    return first, second


def point(*models: Any, digest: str = "a", seeds: tuple[int, ...] = (0, 1, 2)) -> Point:
    """Return a point of models with these answers."""
    answers = [
        Answers(
            accuracy=100 * right.mean(),
            images=len(right),
            digest=digest,
            right=pack(right),
            seed=seed,
        )
        for right, seed in zip(models, seeds, strict=False)
    ]
    accuracies = tuple(one.accuracy for one in answers)
    return Point(accuracies=accuracies, answers=tuple(answers), images=len(models[0]))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 10_000])
def test_packed_answers_come_back_bit_by_bit(count: int) -> None:
    right = np.random.default_rng(0).random(count) < 0.9
    assert (unpack(pack(right), count) == right).all()
    with pytest.raises(ValueError, match="expected"):
        unpack(pack(right), count + 8)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),  # 2 (1 + 2) / 4, at most 1
        (0, 5, 2 / 32),
        (0, 6, 2 / 64),
        (1, 5, 2 * (1 + 6) / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (0, 1000, 2.0**-999),
    ],
)
def test_the_mcnemar_test_is_the_exact_binomial_one(b: int, c: int, p: float) -> None:
    assert mcnemar(*flags(50, b, c, 50)) == p
    assert mcnemar(*flags(0, c, b, 0)) == p


def test_the_mcnemar_test_of_many_images_is_exact_and_near_the_normal_one() -> None:
    p = mcnemar(*flags(4000, 2600, 2400, 1000))
    assert p == pytest.approx(math.erfc((200 - 1) / math.sqrt(2 * 5000)), rel=2e-3)


def test_the_bootstrap_of_single_models_agrees_with_the_mcnemar_test() -> None:
    first, second = flags(9000, 130, 100, 770)
    found = bootstrap(first[None], second[None], same_seeds=False)
    assert found == pytest.approx(mcnemar(first, second), abs=0.03)  # 2,000 draws, p near 0.05
    assert found == bootstrap(first[None], second[None], same_seeds=False)
    assert bootstrap(first[None], first[None], same_seeds=True) == 1.0


def test_the_bootstrap_draws_models_that_share_a_seed_together() -> None:
    """Accuracies of 95, 85, 75 and 93, 83, 73: the seeds move both lines by the same."""
    images = np.arange(2000)
    better = np.stack([images < 20 * level for level in (95, 85, 75)])
    worse = np.stack([images < 20 * level for level in (93, 83, 73)])
    assert bootstrap(better, worse, same_seeds=True) < 0.01
    assert bootstrap(better, worse, same_seeds=False) > 0.3


def test_resampled_models_vary_as_a_mean_of_n_does() -> None:
    """Five models of 2,000 sure images: s^2 / n, with n - 1 degrees of freedom, beside sampling."""
    levels = np.array([90, 92, 94, 96, 98])
    models = np.stack([np.arange(2000) < 20 * level for level in levels])
    reference = np.stack([np.arange(2000) < 20 * 92] * 5)
    exact = student(2.0, float(levels.var(ddof=1)) / 5, 4.0)
    assert bootstrap(models, reference, same_seeds=False) == pytest.approx(exact, abs=0.03)


def test_two_models_that_lie_far_apart_are_not_told_from_better_ones() -> None:
    """32 and 65 % against 82 and 84 %: t = 2.1 with about one degree of freedom."""
    images = np.arange(1000)
    spread = np.stack([images < 10 * level for level in (32, 65)])
    better = np.stack([images < 10 * level for level in (82, 84)])
    assert 0.2 < bootstrap(spread, better, same_seeds=False) < 0.4


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (0.0, 3.0, 1.0),
        (1.0, 1.0, 0.5),
        (12.7062, 1.0, 0.05),
        (4.30265, 2.0, 0.05),
        (2.77645, 4.0, 0.05),
        (1.959964, math.inf, 0.05),
    ],
)
def test_student_has_the_values_of_its_table(t: float, freedom: float, p: float) -> None:
    assert student(2 * t, 4.0, freedom) == pytest.approx(p, abs=1e-5)


def test_a_difference_without_variance_is_sure() -> None:
    assert student(1.0, 0.0, 1.0) == 0.0
    assert student(0.0, 0.0, 1.0) == 1.0


def test_the_test_follows_what_the_rows_tell() -> None:
    first, second = flags(9000, 130, 60, 810)
    assert compare(point(first), point(second)) == ("mcnemar", mcnemar(first, second))
    several = compare(point(first, first), point(second, second))
    assert several is not None
    assert several[0] == "bootstrap"
    told = compare(point(first), point(second, digest="b"))
    assert told is not None
    assert told[0] == "unpaired"
    sampling = 91.3 * 8.7 / 10_000 + 90.6 * 9.4 / 10_000
    assert told[1] == pytest.approx(student(0.7, sampling, math.inf))
    assert compare(point(first), Point(accuracies=(90.0,))) is None


def test_bold_are_the_best_and_all_that_a_paired_test_does_not_tell_from_it() -> None:
    best, close = flags(9000, 110, 90, 800)
    _, far = flags(9000, 110, 50, 840)
    lines: Lines = {"best": {0.5: point(best)}, "close": {0.5: point(close)}}
    lines["far"] = {0.5: point(far)}
    found = find_best(lines, 0.5)
    assert found.names == {"best", "close"}
    assert used_tests([lines]) == ["mcnemar"]
    lines["published"] = {0.5: Point(accuracies=(91.5,), images=10_000)}
    assert "published" in find_best(lines, 0.5).names
    assert used_tests([lines]) == ["unpaired"]  # against the published best, which has no answers


def test_a_line_alone_is_not_the_best_of_anything() -> None:
    assert find_best({"one": {0.5: Point(accuracies=(90.0,))}}, 0.5).names == frozenset()
