"""The parts of README.md and docs/comparison.md that are made from the committed results.

Such a part is between `<!-- results: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import claims
from benchmarks.harness.committed import Committed
from benchmarks.harness.suite import BENCHMARKS
from benchmarks.harness.text import wrapped
from stages.report.summary import PUBLISHED, SECTIONS, Lines, Point
from stages.report.table import legend, table

ROOT = BENCHMARKS.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "comparison.md")
_PART = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_pages(results: Path, pages: Sequence[Path] = PAGES) -> None:
    """Write the parts of the pages; the same documents give the same text, byte for byte."""
    committed = Committed(results)
    for page in pages:
        page.write_text(filled(page.read_text("utf-8"), committed), "utf-8")


def filled(text: str, results: Committed) -> str:
    """Return a page's text with its parts written.

    Raises:
        KeyError: a part has an unknown name.
    """

    def part(found: re.Match[str]) -> str:
        content = PARTS[found[2]](results)
        return f"{found[1]}\n{wrapped(content)}\n\n{found[3]}"

    return _PART.sub(part, text)


_Choose = Callable[[Committed], Lines]


def _tables(tables: dict[str, _Choose]) -> Callable[[Committed], str]:
    """Return a part of tables, each below its title, with one legend below all."""

    def write(results: Committed) -> str:
        found = {title: lines for title, one in tables.items() if (lines := one(results))}
        if not found:
            return "No committed results yet: `python -m benchmarks run` measures them."
        parts = [f"{title}\n\n{table(lines)}" for title, lines in found.items()]
        return "\n\n".join([*parts, legend(found.values())])

    return write


def _sentences(*sentences: Callable[[Committed], str]) -> Callable[[Committed], str]:
    """Return a part of sentences."""
    return lambda results: " ".join(one(results) for one in sentences)


def _section(name: str, mode: str, *, finetuned: bool = False) -> _Choose:
    return lambda results: results.section(name, SECTIONS[mode, finetuned])


def _one_step(results: Committed) -> Lines:
    return results.one_step("estimators", "resnet20")


def _of_each_method(choose: _Choose) -> _Choose:
    """Return each method's highest line, by the mean over its columns; published ones stay."""

    def chosen(results: Committed) -> Lines:
        lines = choose(results)
        columns = max(len(line) for line in lines.values()) if lines else 0
        best: dict[str, str] = {}
        for name, line in lines.items():
            published = name.endswith(PUBLISHED)
            method = name if published else name.partition(" ")[0]
            if published or len(line) == columns:
                best[method] = max(best.get(method, name), name, key=lambda one: _mean(lines[one]))
        return {name: line for name, line in lines.items() if name in best.values()}

    return chosen


def _mean(line: Mapping[float, Point]) -> float:
    return sum(point.mean for point in line.values()) / len(line)


def _mlpnet_one_step(results: Committed) -> Lines:
    return results.one_step("mnist_mlp", "mlpnet") if results.documents("mnist_mlp") else {}


def _several_steps(name: str) -> _Choose:
    return lambda results: results.several_steps(name)


def _without(choose: _Choose, sparsity: float) -> _Choose:
    """Return lines without a column, so that the table fits a line of the README."""
    return lambda results: {
        name: {at: point for at, point in line.items() if at != sparsity}
        for name, line in choose(results).items()
    }


PARTS: dict[str, Callable[[Committed], str]] = {
    "overview": _tables(
        {
            "One step, by ADMM (`selection: admm`); each method's highest complete row, by its "
            "mean:": _of_each_method(_one_step),
            "Several steps, greedy removal:": _without(_several_steps("resnet20"), 0.6),
        }
    ),
    "one_step": _tables(
        {"One step, mask and values chosen together (`selection: admm`):": _one_step}
    ),
    "several_steps": _tables({"Several steps:": _several_steps("resnet20")}),
    "best": _sentences(claims.best_one_step, claims.learned_one_step, claims.seeds_used),
    "ends": _sentences(claims.ends),
    "distillation": _sentences(claims.distillation),
    "refinement": _sentences(claims.refinement_gain, claims.costs),
    "paying": _sentences(claims.after_training),
    "mlpnet_one_step": _tables({"One step:": _mlpnet_one_step}),
    "mlpnet_several_steps": _tables({"Several steps:": _several_steps("mlpnet")}),
    "chita": _sentences(claims.chita),
    "digits_one_step": _tables({"One step:": _section("digits", "oneshot")}),
    "digits_training": _tables(
        {
            "One step, then five epochs under the mask:": _section(
                "digits", "oneshot", finetuned=True
            ),
            "Gradual, in eight steps with an epoch after each:": _section("digits", "gradual"),
            "Gradual, then five epochs:": _section("digits", "gradual", finetuned=True),
        }
    ),
    "verdicts": claims.verdicts,
    "optimiser": _sentences(claims.optimiser),
}
"""Name of a part -> its content."""
