"""The report: a section for each benchmark, made from the committed JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

from benchmarks.harness.claims import after_training
from benchmarks.harness.committed import Committed, read_comparison
from benchmarks.harness.documents import Document, read_cells
from benchmarks.harness.suite import BENCHMARKS, Benchmark, list_benchmarks, load_script
from benchmarks.harness.sweeps import HIGHEST, LOWEST
from benchmarks.harness.text import wrapped
from stages.columns import target_of
from stages.report.figure import draw
from stages.report.labels import labels_of
from stages.report.summary import PUBLISHED, Lines, summarise
from stages.report.table import dense_title, footnotes, legend, table

RESULTS = BENCHMARKS / "results"
REPORT = BENCHMARKS.parent / "docs" / "results.md"
_HEAD = (
    "# Results\n\n"
    "`make results` writes this page from the documents in `benchmarks/results`; `make benchmarks` "
    "runs the unfinished cells. Each document names its environment. Settings are chosen on "
    "validation images; the published ResNet20 saw its own in training. A sweep whose best value "
    "is an end of its grid is extended by factors of ten, within {lowest:g} to {highest:g}."
)
_LEGEND = (
    "In brackets the cost of making the model from the dense one: processor seconds (wall-clock on "
    "a GPU) and peak resident memory."
)

_CERTIFICATE = {
    "log_det_objective": "L(Q)",
    "objective": "J(Q)",
    "rescaled_objective": "J(a* Q)",
    "diagonal_objective": "J(diagonal)",
    "best_scale": "a*",
    "residual": "residual",
}
_CERTIFICATE_LEGEND = (
    "The certificate of each chosen estimate of the first seed, on held-out samples "
    "(`fishleg.certificate`): the log-det objective L and the FishLeg objective J, where lower is "
    "better within a damping; J after the best rescaling a*; J of the best diagonal; a*, which is "
    "1 if the scale is right; and the residual, 0 at best and 1 for Q = 0."
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
    head = _HEAD.format(lowest=LOWEST, highest=HIGHEST)
    if read_cells(results, "digits"):
        head += f"\n\n{after_training(Committed(results))}"
    text = "\n\n".join([head, *(section.strip() for section in sections)])
    report.write_text(f"{wrapped(text)}\n", encoding="utf-8")


def _section(benchmark: Benchmark, documents: Mapping[str, Document], figures: Path) -> str:
    if benchmark.is_pipeline:
        return _pipeline_section(benchmark, documents, figures)
    module = load_script(benchmark.path)
    return f"## {module.TITLE}\n\n{module.report(dict(documents), figures)}"


def _pipeline_section(
    benchmark: Benchmark, documents: Mapping[str, Document], figures: Path
) -> str:
    title, published = read_comparison(benchmark)
    rows = [{**document, "model_cell": cell} for cell, document in documents.items()]
    accuracy = summarise(rows, published=published)
    figure = figures / f"{benchmark.name}.png"
    draw(accuracy, title, figure)
    seconds, memory, gpu_memory = (
        summarise([{**row, "accuracy": number(row)} for row in rows]).sections
        for number in (_seconds, itemgetter("peak_bytes"), _gpu_bytes)
    )
    parts = [f"## {title}"]
    for label, point in accuracy.dense.items():
        parts.append(f"{dense_title(label)}: {point.text} %.")
    for name, lines in accuracy.sections.items():
        costs = [columns.get(name, {}) for columns in (seconds, memory, gpu_memory)]
        parts += [f"### {name}", table(lines, partial(_cost, costs))]
    parts.append(f"{legend(accuracy.sections.values())} {_LEGEND}")
    parts += [
        *footnotes(accuracy),
        *_certificates(rows),
        f"![{title}]({figures.name}/{figure.name})",
    ]
    return "\n\n".join(parts)


def _certificates(rows: Sequence[Document]) -> list[str]:
    """Return the table of certificates, one row for each estimate that has one."""
    label = labels_of(rows)
    certified = [row for row in rows if "certificate" in row]
    first = min((row["seed"] for row in certified), default=0)
    models: dict[tuple[str, ...], list[str]] = {}
    for row in sorted(certified, key=lambda row: (row["method"], target_of(row))):
        if row["seed"] == first:
            found = row["certificate"]  # without L in documents of before
            numbers = [f"{found[name]:.4g}" if name in found else "" for name in _CERTIFICATE]
            estimate = (label(row), f"{row['damping']:g}", *numbers)
            models.setdefault(estimate, []).append(f"{target_of(row):g}")
    if not models:
        return []
    lines = [
        f"| {' | '.join([method, damping, ', '.join(dict.fromkeys(sparsities)), *numbers])} |"
        for (method, damping, *numbers), sparsities in models.items()
    ]
    titles = " | ".join(["method", "damping", "chosen at", *_CERTIFICATE.values()])
    head = [f"| {titles} |", f"|---|---:|---|{'---:|' * len(_CERTIFICATE)}"]
    return [_CERTIFICATE_LEGEND, "\n".join([*head, *lines])]


def _seconds(row: Document) -> float:
    """Return the processor seconds, or the wall-clock seconds if a GPU computed."""
    return row["seconds"] if "gpu_peak_bytes" in row else row["cpu_seconds"]


def _gpu_bytes(row: Document) -> float:
    return row.get("gpu_peak_bytes", 0)


def _cost(costs: Sequence[Lines], method: str, sparsity: float) -> str:
    """Return the cost of a line's models at a sparsity, or nothing for published ones."""
    seconds, memory, gpu_memory = costs
    if method.endswith(PUBLISHED):
        return ""
    took_s = seconds[method][sparsity].mean
    peak = max(memory[method][sparsity].accuracies)
    gpu_peak = max(gpu_memory[method][sparsity].accuracies)
    on_gpu = f" + {gpu_peak / 1e6:.0f} on the GPU" if gpu_peak else ""
    return f" ({took_s:.0f} s, {peak / 1e6:.0f} MB{on_gpu})"
