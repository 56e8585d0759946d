"""The report: a section for each benchmark, made from the committed JSON and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.documents import Document, read_cells
from benchmarks.harness.suite import BENCHMARKS, Benchmark, list_benchmarks, load_script
from pipeline.spec import load_spec
from stages.report.figure import draw
from stages.report.summary import PUBLISHED, Lines, Point, Summary, summarise

RESULTS = BENCHMARKS / "results"
REPORT = BENCHMARKS.parent / "docs" / "results.md"
_HEAD = """# Results

Made by `make results` from the documents in `benchmarks/results`; `make benchmarks` runs what is
not finished. Each document names the environment that it was made in."""
_LEGEND = (
    "Accuracy on the test images in percent, mean ± half the range over seeds, the best of a "
    "column bold; in brackets the processor seconds and the peak of resident memory that it took "
    "to make the model from the dense one. Columns are the fractions of weights removed."
)


def write_report(
    report: Path = REPORT, results: Path = RESULTS, benchmarks: Path = BENCHMARKS
) -> None:
    """Write the report, and its figures beside it in a folder of its name.

    The same documents give the same text, byte for byte.
    """
    figures = report.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)
    sections = [
        _section(benchmark, documents, figures)
        for benchmark in list_benchmarks(benchmarks)
        if (documents := read_cells(results, benchmark.name))
    ]
    text = "\n\n".join([_HEAD, *(section.strip() for section in sections)])
    report.write_text(f"{text}\n", encoding="utf-8")


def _section(benchmark: Benchmark, documents: Mapping[str, Document], figures: Path) -> str:
    if benchmark.is_pipeline:
        return _pipeline_section(benchmark, documents, figures)
    module = load_script(benchmark.path)
    return f"## {module.TITLE}\n\n{module.report(dict(documents), figures)}"


def _pipeline_section(
    benchmark: Benchmark, documents: Mapping[str, Document], figures: Path
) -> str:
    title, published = _comparison(benchmark)
    rows = [{**document, "model_cell": cell} for cell, document in documents.items()]
    accuracy = summarise(rows, published=published)
    figure = figures / f"{benchmark.name}.png"
    draw(accuracy, title, figure)
    seconds, memory = (
        summarise([{**row, "accuracy": row[column]} for row in rows])
        for column in ("cpu_seconds", "peak_bytes")
    )
    parts = [f"## {title}"]
    if accuracy.dense is not None:
        parts.append(f"Dense network: {_text(accuracy.dense)} %.")
    for name, lines in accuracy.sections.items():
        parts += [f"### {name}", _table(lines, _lines(seconds, name), _lines(memory, name))]
    parts += [_LEGEND, f"![{title}]({figures.name}/{figure.name})"]
    return "\n\n".join(parts)


def _comparison(benchmark: Benchmark) -> tuple[str, list[tuple[str, dict[float, float]]]]:
    """Return the title and the published rows that the pipeline's `compare` is given."""
    for cell in load_spec(benchmark.path).cells:
        if cell.declaration.name == "compare":
            params: Any = cell.params
            rows = [
                (row.method, dict(zip(row.sparsity, row.accuracy, strict=True)))
                for row in params.published
            ]
            return params.title, rows
    return benchmark.name, []


def _lines(summary: Summary, section: str) -> Lines:
    return summary.sections.get(section, {})


def _table(accuracy: Lines, seconds: Lines, memory: Lines) -> str:
    sparsities = sorted({sparsity for points in accuracy.values() for sparsity in points})
    best = {sparsity: _best(accuracy, sparsity) for sparsity in sparsities}
    head = [f"| method | {' | '.join(f'{sparsity:g}' for sparsity in sparsities)} |"]
    head.append(f"|---|{'---:|' * len(sparsities)}")
    for method, points in accuracy.items():
        cells: list[str] = []
        for sparsity in sparsities:
            if sparsity not in points:
                cells.append("")
                continue
            text = _text(points[sparsity])
            text = f"**{text}**" if method == best[sparsity] else text
            if not method.endswith(PUBLISHED):
                cpu_s = seconds[method][sparsity].mean
                peak = max(memory[method][sparsity].accuracies)
                text += f" ({cpu_s:.0f} s, {peak / 1e6:.0f} MB)"
            cells.append(text)
        name = f"*{method}*" if method.endswith(PUBLISHED) else method
        head.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(head)


def _best(lines: Lines, sparsity: float) -> str:
    """Return the method with the highest mean at a sparsity, published ones among them."""
    return max(_at(lines, sparsity), key=lambda pair: pair[1])[0]


def _at(lines: Lines, sparsity: float) -> Iterable[tuple[str, float]]:
    return [(name, points[sparsity].mean) for name, points in lines.items() if sparsity in points]


def _text(point: Point) -> str:
    spread = f" ± {point.spread:.2f}" if len(point.accuracies) > 1 else ""
    return f"{point.mean:.2f}{spread}"
