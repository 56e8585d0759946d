"""Tests that tell whether one line of a table is better than another at one sparsity.

Letters: N images, n models of one line (seeds), B resamples. Three tests, in order of preference:

    exact McNemar       two single models, the same images: of the images that exactly one of them
                        gets right, each is equally likely to be either's;
    paired bootstrap    several models, the same images: the difference of the means against its
                        standard deviation over resamples of images and models;
    unpaired            otherwise: against sqrt(v_1 + v_2), v = a (1 - a) / N + s^2 / n. It ignores
                        that two models err on the same images, and so tells fewer lines apart.

The last two use Student's t: few models tell their own deviation badly (B. L. Welch, Biometrika,
1947).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.report.summary import Lines, Point

Test = Literal["mcnemar", "bootstrap", "unpaired"]
LEVEL = 0.05
DESCRIPTIONS: Mapping[Test, str] = {
    "mcnemar": "an exact McNemar test on the same images for two single models",
    "bootstrap": "a paired bootstrap over images and models, with Student's t, for several",
    "unpaired": (
        "the unpaired difference against its sampling and seed deviation, which tells fewer lines "
        "apart, for rows that do not say which images are right"
    ),
}
_RESAMPLES = 2000
_CHUNK = 200
_POINTS = 20_000
_NORMAL = 10_000  # degrees of freedom from which t is normal


@dataclass(frozen=True, kw_only=True)
class Best:
    """The lines of a column that are not told from its best one.

    Attributes:
        names: of these lines, the best one among them; empty if there is nothing to compare.
        tests: the tests that were used.
    """

    names: frozenset[str] = frozenset()
    tests: frozenset[Test] = frozenset()


def find_best(lines: Lines, sparsity: float) -> Best:
    """Return the line with the highest mean, and all that a test at 5 % does not tell from it.

    Published lines take part. A line without a known number of images is only ever the best.

    Cost: B N operations for the first bootstrap of N images, B n for each further one.
    """
    points = {
        name: line[sparsity]
        for name, line in lines.items()
        if sparsity in line and line[sparsity].accuracies
    }
    if len(points) < 2:
        return Best()
    best = max(points, key=lambda name: points[name].mean)
    names, tests = {best}, set[Test]()
    for name, point in points.items():
        if name != best and (found := compare(points[best], point)) is not None:
            test, p = found
            tests.add(test)
            if p >= LEVEL:
                names.add(name)
    return Best(names=frozenset(names), tests=frozenset(tests))


def used_tests(sections: Iterable[Lines]) -> list[Test]:
    """Return the tests behind the best lines of all columns, in the order of `DESCRIPTIONS`."""
    used = {
        test
        for lines in sections
        for sparsity in {at for line in lines.values() for at in line}
        for test in find_best(lines, sparsity).tests
    }
    return [test for test in DESCRIPTIONS if test in used]


def compare(first: Point, second: Point) -> tuple[Test, float] | None:
    """Return the test that the points allow and its two-sided p, or None without a test.

    Args:
        first: of one line.
        second: of another one, at the same sparsity.
    """
    flags = _common_flags(first, second)
    if flags is not None:
        if len(flags[0]) == len(flags[1]) == 1:
            return "mcnemar", mcnemar(flags[0][0], flags[1][0])
        seeds = [sorted(one.seed or 0 for one in point.answers) for point in (first, second)]
        same = seeds[0] == seeds[1] and len({*seeds[0]}) == len(seeds[0])
        return "bootstrap", bootstrap(*flags, same_seeds=same)
    if first.sampling is None or second.sampling is None:
        return None
    parts = [(one.deviation or 0.0) ** 2 / len(one.accuracies) for one in (first, second)]
    variance = first.sampling**2 + second.sampling**2 + sum(parts)
    counts = [len(one.accuracies) for one in (first, second)]
    return "unpaired", student(
        first.mean - second.mean, variance, _freedom(variance, parts, counts)
    )


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p of McNemar's test, in [0, 1].

    With b images that only the first model gets right, c that only the second does, and m = b + c:
    p = min(1, 2 sum_{k <= min(b, c)} C(m, k) / 2^m) (Q. McNemar, Psychometrika, 1947).

    Args:
        first: (N,) bool, right answers of one model.
        second: (N,) bool, of the other on the same images.

    Cost: O(m) operations on integers of m bits.
    """
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    term = total = 1
    for k in range(1, min(b, c) + 1):
        term = term * (b + c - k + 1) // k
        total += term
    return min(1.0, 2 * total / (1 << (b + c)))  # of integers, so exact to the last bit


def bootstrap(first: NDArray[np.bool_], second: NDArray[np.bool_], *, same_seeds: bool) -> float:
    """Return the two-sided p of the difference of two mean accuracies, in [0, 1].

    Each resample draws N of the N images, the same for both lines, and n - 1 of a line's n models:
    the mean of n - 1 draws has the variance s^2 / n of a mean, where n draws would have less (J. N.
    K. Rao and C. F. J. Wu, Resampling inference with complex survey data, 1988). A single model is
    taken as it is. The draws are the same in every call.

    Args:
        first: (n, N) bool, right answers of one line's models, ordered by seed.
        second: (n', N) bool, of another line's models on the same images, likewise.
        same_seeds: whether models of one place have one seed: they are drawn together then.
    """
    means = [_resampled(flags) for flags in (first, second)]
    draws = np.random.default_rng(1)
    chosen = _draw_models(draws, len(first))
    other = chosen if same_seeds else _draw_models(draws, len(second))
    images = means[0].mean(1) - means[1].mean(1)
    both = (means[0] * chosen).sum(1) - (means[1] * other).sum(1)
    variance = float(both.var())
    models = max(0.0, variance - float(images.var()))
    fewest = min(count for count in (len(first), len(second)) if count > 1 or models == 0)
    freedom = _freedom(variance, [models], [fewest])
    return student(float(first.mean() - second.mean()), variance, freedom)


def student(difference: float, variance: float, freedom: float) -> float:
    """Return the two-sided p of a difference whose variance has degrees of freedom, in [0, 1].

    With t = difference / sqrt(variance) and f degrees of freedom, at least 1,
    p = (integral of cos(x)^(f - 1) from atan(|t| / sqrt(f)) to pi / 2) / (the same from 0).

    >>> round(student(1.96, 1.0, math.inf), 3), round(student(12.706, 1.0, 1.0), 3)
    (0.05, 0.05)
    """
    if variance == 0:
        return float(difference == 0)
    t = abs(difference) / math.sqrt(variance)
    if freedom > _NORMAL:
        return math.erfc(t / math.sqrt(2))
    start = math.atan(t / math.sqrt(freedom))
    tail, whole = (_cosine_power(low, freedom - 1) for low in (start, 0.0))
    return min(1.0, tail / whole)


def _cosine_power(low: float, power: float) -> float:
    """Return the integral of cos(x)^power from `low` to pi / 2, by the midpoint rule."""
    width = (math.pi / 2 - low) / _POINTS
    places = low + width * (np.arange(_POINTS) + 0.5)
    return float((np.cos(places) ** power).sum() * width)


def _freedom(variance: float, parts: Sequence[float], counts: Sequence[int]) -> float:
    """Return the degrees of freedom of a variance: Welch's, of its parts from few models."""
    lost = sum(
        part**2 / (count - 1) for part, count in zip(parts, counts, strict=True) if count > 1
    )
    return math.inf if lost == 0 else variance**2 / lost


def _common_flags(
    first: Point, second: Point
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Return each point's flags, (n, N) bool by seed, if all are of the same images."""
    both = (*first.answers, *second.answers)
    if not first.answers or not second.answers or len({one.digest for one in both}) > 1:
        return None
    found = []
    for point in (first, second):
        ordered = sorted(point.answers, key=lambda one: one.seed or 0)
        flags = [known for one in ordered if (known := one.flags()) is not None]
        if len(flags) < len(ordered):
            return None
        found.append(np.stack(flags))
    return found[0], found[1]


def _resampled(flags: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the accuracies, (B, n), of n models on resampled images."""
    count = flags.shape[1]
    columns = flags.T.astype(np.float32)
    weights = _image_weights(count)
    parts = [
        weights[at : at + _CHUNK].astype(np.float32) @ columns
        for at in range(0, _RESAMPLES, _CHUNK)
    ]
    return np.concatenate(parts).astype(np.float64) / count  # sums below 2^24 are exact


@lru_cache(maxsize=1)
def _image_weights(count: int) -> NDArray[np.uint8]:
    """Return how often each resample has each image, (B, N)."""
    draws = np.random.default_rng(0)
    rows = [
        np.bincount(draws.integers(count, size=count), minlength=count) for _ in range(_RESAMPLES)
    ]
    return np.stack(rows).astype(np.uint8)


def _draw_models(draws: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Return the weight of each of a line's models in each resample, (B, n); rows add up to 1."""
    if count == 1:
        return np.ones((_RESAMPLES, 1))
    return draws.multinomial(count - 1, np.full(count, 1 / count), size=_RESAMPLES) / (count - 1)
