"""The report that is committed is what the committed results give."""

from pathlib import Path

from benchmarks.harness.report import REPORT, write_report


def test_the_report_is_what_the_results_give(tmp_path: Path) -> None:
    write_report(tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == REPORT.read_text()
    figures = {path.name for path in (tmp_path / "results").iterdir()}
    assert figures <= {path.name for path in REPORT.with_suffix("").glob("*.png")}
