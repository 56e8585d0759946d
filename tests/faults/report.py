"""The fault cases as two tables: `python -m tests.faults.report build/faults.jsonl`.

They show the code that was tested last: its cases of the matrix, and the others file by file.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path

from tests.faults.ledger import newest, read_lines
from tests.faults.matrix import HOWS, STAGES, VICTIMS, cases

_NAMES = {"kill": "kill -9", "term": "SIGTERM", "pause": "SIGSTOP, 3 leases"}


def matrix_table(lines: list[dict]) -> str:
    """Return Markdown: a row for each victim and way, from the cases of the matrix."""
    groups = defaultdict(list)
    for line in lines:
        victim, how, _ = line["case"].split(",")
        groups[victim, how].append(line)
    rows = ["| victim | how | stages | lost | recovered unaided | resumed | s, median |"]
    rows.append("|---|---|---:|---:|---:|---:|---:|")
    for victim in VICTIMS:
        for how in HOWS:
            group = groups[victim, how]
            if not group:
                continue
            alone = sum(line.get("exit_codes") == [0] for line in group)
            seconds = statistics.median(line["seconds"] for line in group)
            lost = sum(not line["ok"] for line in group)
            rows.append(
                f"| {victim} | {_NAMES[how]} | {len(group)} of {len(STAGES)} | {lost} | {alone} | "
                f"{len(group) - alone - lost} | {seconds:.0f} |"
            )
    return "\n".join(rows)


def files_table(lines: list[dict]) -> str:
    """Return Markdown: a row for each file, from the cases that are not of the matrix."""
    groups = defaultdict(list)
    for line in lines:
        groups[line["case"].partition("::")[0]].append(line)
    rows = ["| file | cases | lost | s |", "|---|---:|---:|---:|"]
    for file, group in sorted(groups.items()):
        lost = sum(not line["ok"] for line in group)
        seconds = sum(line["seconds"] for line in group)
        rows.append(f"| `{file}` | {len(group)} | {lost} | {seconds:.0f} |")
    return "\n".join(rows)


def main(path: Path) -> None:
    """Print both tables."""
    lines = read_lines(path)
    known = newest(lines, lines[-1]["code"])
    matrix = [known.pop(case) for case in cases() if case in known]
    print(f"{matrix_table(matrix)}\n\n{files_table(list(known.values()))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
