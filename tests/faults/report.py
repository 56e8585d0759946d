"""The fault matrix as a table: `python -m tests.faults.report build/faults.jsonl`."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from tests.faults.matrix import HOWS, STAGES, VICTIMS

_NAMES = {"kill": "kill -9", "term": "SIGTERM", "pause": "SIGSTOP, 3 leases"}


def table(lines: list[dict]) -> str:
    """Return Markdown: a row for each victim and way, from the cases of the matrix."""
    groups = defaultdict(list)
    for line in lines:
        victim, how, _ = line["case"].split(",")
        groups[victim, how].append(line)
    rows = ["| victim | how | stages | lost | went on by itself | resumed | s, median |"]
    rows.append("|---|---|---:|---:|---:|---:|---:|")
    for victim in VICTIMS:
        for how in HOWS:
            group = groups[victim, how]
            if not group:
                continue
            alone = sum(line.get("exit_codes") == [0] for line in group)
            seconds = statistics.median(line.get("seconds", 0) for line in group)
            lost = sum(not line["ok"] for line in group)
            rows.append(
                f"| {victim} | {_NAMES[how]} | {len(group)} of {len(STAGES)} | {lost} | {alone} | "
                f"{len(group) - alone - lost} | {seconds:.0f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    found = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    print(table(found))  # noqa: T201
