"""A store of another version is refused by every command, by name and remedy, and left as it is."""

from pathlib import Path

import pytest
from toy_runs import fls, last_run, run_here, write_spec

from pipeline.store.checksum import with_checksum

COMMANDS = [
    ("run", "--executor", "local"),
    ("plan",),
    ("status",),
    ("status", "RUN"),
    ("resume", "RUN"),
    ("logs", "start"),
    ("results",),
    ("sync",),
    ("stop", "RUN"),
    ("gc", "--grace", "1s", "--apply"),
    ("verify", "--set-aside"),
    ("accept", "start", "--why", "it is the same"),
]


@pytest.mark.parametrize("version", ["earlier", "later", "earliest"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_store_of_another_version_is_refused_and_left_alone(
    toy: Path, command: tuple[str, ...], version: str
) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    run = last_run().run_id
    about = {
        "earlier": with_checksum({"format": 1, "token": "t"}),
        "later": with_checksum({"format": 3, "token": "t", "more": {}}),
        "earliest": b'{\n "format": 1,\n "token": "t"\n}',  # before checksums
    }[version]
    Path(".fls/storage.json").write_bytes(about)
    for result in Path(".fls").glob("stages/*/manifest.json"):
        result.write_text("what this version takes for damage")
    before = {path: path.read_bytes() for path in Path(".fls").rglob("*") if path.is_file()}
    code, output, errors = fls(*(part.replace("RUN", run) for part in command))
    assert code == 1, output
    number, whose = (3, "a later") if version == "later" else (1, "an earlier")
    assert f"has the layout of version {number}, of {whose} fls" in errors
    assert "Use the fls that made it, or another storage." in errors
    after = {path: path.read_bytes() for path in Path(".fls").rglob("*") if path.is_file()}
    assert after == before
