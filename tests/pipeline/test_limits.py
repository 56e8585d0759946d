"""Specs that are too large, too deep, or not text: one clear error, in bounded time and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import DIAMOND, ROOT, write_spec

from pipeline.base import limits
from pipeline.base.errors import SpecError
from pipeline.spec.cells import StageSpec
from pipeline.spec.load import load_spec

HEAD = "name: toy\nplugins: [toy]\n"
TAIL = "stages: {s: {uses: start, params: {value: 1}}}\n"
LAUGHS = "a0: &a0 [1, 2, 3]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
MERGES = "m0: &m0 {x: 1}\n" + "".join(
    f"m{i}: &m{i} {{k{i}: {{<<: *m{i - 1}}}, <<: [*m{i - 1}, *m{i - 1}, *m{i - 1}]}}\n"
    for i in range(1, 30)
)
DOUBLING = "vars:\n  v0: aaaaaaaaaa\n" + "".join(
    f'  v{i}: "${{vars.v{i - 1}}}${{vars.v{i - 1}}}"\n' for i in range(1, 40)
)
LISTS = "vars:\n  v0: [1, 2]\n" + "".join(
    f'  v{i}: ["${{vars.v{i - 1}}}", "${{vars.v{i - 1}}}"]\n' for i in range(1, 40)
)
CHAIN = 'vars:\n  v0: "${vars.v1}"\n' + "".join(
    f'  v{i}: "${{vars.v{i + 1}}}"\n' for i in range(1, 900)
)
LONG_TEXT = "vars:\n  long: " + "x" * 100_000 + "\n  y: [" + '"a${vars.long}", ' * 500 + "]\n"
VALUES = "expected at most 20,000 keys and values"
DEPTH = "expected at most 32 mappings, lists and variables in each other, got more"
TEXTS = "expected at most 262,144 characters of text with ${...}, got more"
EVERY_SEED = f"[{', '.join(map(str, range(2_000)))}]"

# What is given -> the errors. Each is loaded in one process of limited memory.
CASES = {
    "aliases": (HEAD + LAUGHS + TAIL, [f"p.yaml:3:13: {VALUES}"]),
    "merges": (HEAD + MERGES + TAIL, [f"p.yaml:3:10: {VALUES}"]),
    "deep flow": (HEAD + "vars: " + "[" * 50_000, [f"p.yaml:3:39: {DEPTH}"]),
    "deep mappings": (HEAD + "vars: " + "{a: " * 50_000, [f"p.yaml:3:132: {DEPTH}"]),
    "deep blocks": (HEAD + "- " * 50_000, ["p.yaml:3:1: no valid YAML: "]),
    "deep lists": ("- " * 50_000, [f"p.yaml:1:67: {DEPTH}"]),
    "doubling text": (HEAD + DOUBLING + TAIL, [f"p.yaml:6:7: {TEXTS}"]),
    "long text": (HEAD + LONG_TEXT + TAIL, [f"p.yaml:5:41: {TEXTS}"]),
    "doubling lists": (HEAD + LISTS + TAIL, [f"p.yaml:4:11: {VALUES}"]),
    "a chain of variables": (HEAD + CHAIN + TAIL, [f"p.yaml:35:8: {DEPTH}"]),
    "many stages": (
        HEAD + "stages:\n" + "".join(f"  s{i}: {{uses: total}}\n" for i in range(9_000)),
        [f"p.yaml:5002:3: {VALUES}"],
    ),
    "many mistakes": (
        HEAD + "stages:\n" + "".join(f"  s{i}: {{uses: x}}\n" for i in range(2_000)),
        [*["p.yaml:"] * 50, "Stopped after 50 problems; there may be more."],
    ),
    "many stages that are missing": (
        HEAD
        + "stages:\n"
        + "".join(f"  s{i}: {{uses: total, inputs: {{numbers: t{i}}}}}\n" for i in range(1_200)),
        [*["p.yaml:"] * 50, "Stopped after 50 problems; there may be more."],
    ),
    "a long chain": (
        HEAD
        + TAIL.replace("}}}\n", "}},\n")
        + "".join(
            f"  s{i}: {{uses: add, inputs: {{number: s{i - 1 if i else ''}}}}},\n"
            for i in range(1_200)
        )
        + "}",
        [],
    ),
    "many cycles": (
        HEAD
        + "stages:\n"
        + "".join(f"  s{i}: {{uses: add, inputs: {{number: s{i}}}}}\n" for i in range(1_200)),
        [*["p.yaml:"] * 50, "Stopped after 50 problems; there may be more."],
    ),
    "a matrix": (
        HEAD + f"vars: {{v: &v {EVERY_SEED}}}\n"
        "stages: {s: {uses: slow, matrix: {seed: *v, steps: *v, delay_s: [0, 1]}}}\n",
        [
            "p.yaml:4:34: expected at most 5,000 cells in a pipeline, got 8,000,000 up to this "
            "stage, which has 8,000,000"
        ],
    ),
    "many schemes": (HEAD + "# " + "a://" * 60_000 + "\n" + TAIL, []),
    "many queries": (HEAD + "# " + "://a?" + "key" * 80_000 + "\n" + TAIL, []),
    "not UTF-8": (b"name: toy\nplug\xc3\xa9: \xff\xfe", ["p.yaml:2:8: expected text in UTF-8, "]),
    "NUL": (b"name: toy\n\na\x00b", ["p.yaml:3:2: no valid YAML: the character U+0000 is not"]),
    "garbage": (bytes(range(256)) * 999, ["p.yaml:2:118: expected text in UTF-8, got the byte"]),
    "surrogates": (
        HEAD + 'vars: {a: "\\ud800"}\n' + TAIL,
        ["p.yaml:3:11: the control character U+D800 is not allowed in a value"],
    ),
    "an escape beyond Unicode": (
        HEAD + 'vars: "\\UFFFFFFFF"\n',
        ["p.yaml:3:10: no valid YAML: a number is out of range"],
    ),
    "terminal sequences": (
        HEAD + 'vars: {"\\e[2J": 1, b: "\\e]0;x\\a"}\n' + TAIL,
        [
            "p.yaml:3:8: the control character U+001B is not allowed in a value",
            "p.yaml:3:23: the control character U+001B is not allowed in a value",
        ],
    ),
    "huge integers": (
        HEAD + "stages:\n  s: {uses: start, params: {value: " + "9" * 200_000 + "}}\n",
        ['p.yaml:4:36: value: expected integer, got the string "999'],
    ),
    "a huge hexadecimal": (
        HEAD + "stages:\n  s: {uses: start, params: {value: 0x" + "f" * 200_000 + "}}\n",
        ['p.yaml:4:36: value: expected integer, got the string "0xfff'],
    ),
    "no number": (
        HEAD + "stages:\n  s: {uses: slow, params: {delay_s: .nan, steps: -.inf}}\n",
        [
            'p.yaml:4:37: delay_s: expected number, got the string ".nan"',
            'p.yaml:4:50: steps: expected integer, got the string "-.inf"',
        ],
    ),
    "a huge size": (
        HEAD + "stages:\n  s: {uses: start, params: {value: 1}, resources: {memory: "
        + "9" * 400
        + "GB}}\n",
        ["p.yaml:4:60: resources.memory: expected bytes, or a size such as 4GB or 512MiB, got"],
    ),
    "a long key": (
        HEAD + "stages:\n  s: {uses: start, ? " + "x" * 200_000 + "\n  : 1, params: {value: 1}}\n",
        ["p.yaml:4:22: unknown key 'xxx"],
    ),
}  # fmt: skip

MEGABYTES = 60
# Loads one file after the other and prints a JSON line for each: errors, CPU seconds, megabytes.
_LOADER = f"""
import json, re, resource, sys, time
from pathlib import Path
from pipeline.base.errors import PipelineError
from pipeline.spec.load import load_spec

def memory(which):
    status = Path("/proc/self/status").read_text()
    return int(re.search(which + r":\\s*(\\d+) kB", status)[1]) / 1024

def load(name):
    Path(name).rename("p.yaml")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured anew
    before, began = memory("VmRSS"), time.process_time()
    try:
        load_spec(Path("p.yaml"))
        error = ""
    except PipelineError as raised:
        error = str(raised)
    seconds = time.process_time() - began
    return [error.splitlines(), seconds, memory("VmHWM") - before]

load("first")  # imports what is imported lazily
limit = int((memory("VmSize") + {MEGABYTES}) * 1024 * 1024)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in sys.argv[1:]:
    print(json.dumps(load(name)))
"""


def test_each_gets_a_clear_error_within_a_second_and_bounded_memory(toy: Path) -> None:
    for number, (content, _) in enumerate(CASES.values()):
        data = content.encode() if isinstance(content, str) else content
        Path(f"{number}").write_bytes(data)
    Path("first").write_text(HEAD + TAIL.replace("uses", "usse"))
    with Path("huge").open("wb") as file:  # 100 MB, of which the disk holds nothing
        file.truncate(100 << 20)
    wanted = {name: errors for name, (_, errors) in CASES.items()}
    wanted["100 MB"] = ["p.yaml:1:1: expected a file of at most 262,144 bytes, got 104,857,600"]
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, *map(str, range(len(CASES))), "huge"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{toy}"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for (name, errors), line in zip(wanted.items(), done.stdout.splitlines(), strict=True):
        found, seconds, megabytes = json.loads(line)
        assert [one[: len(want)] for one, want in zip(found, errors, strict=True)] == errors, name
        assert all(len(one) < 1_200 for one in found), name
        assert seconds < 1, name
        assert megabytes < MEGABYTES, name


def test_what_is_no_file_is_refused_before_it_is_read(toy: Path) -> None:
    os.mkfifo("p.yaml")  # reading it would wait for ever
    for path in ("p.yaml", "/dev/zero", "."):
        with pytest.raises(
            SpecError.__base__, match=f"cannot read {path}: expected a regular file"
        ):  # type: ignore[arg-type]
            load_spec(Path(path))


def test_no_cell_is_made_of_a_matrix_beyond_the_limit(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(StageSpec, "points", lambda stage: made.append(stage.name) or [])
    stages = "stages: {s: {uses: slow, matrix: {seed: [0, 1, 2], steps: [1, 2, 3]}}}"
    Path("p.yaml").write_text(HEAD + stages)
    monkeypatch.setattr(limits, "CELLS", 8)
    with pytest.raises(SpecError, match="at most 8 cells in a pipeline, got 9 up to this stage"):
        load_spec(Path("p.yaml"))
    assert made == []
    monkeypatch.setattr(limits, "CELLS", 9)
    load_spec(Path("p.yaml"))
    assert made


def test_connections_are_counted_before_they_are_made(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_spec(DIAMOND)
    monkeypatch.setattr(limits, "LINKS", 4 + 2 + 4 + 1)
    load_spec(path)
    monkeypatch.setattr(limits, "LINKS", 5)
    with pytest.raises(SpecError) as raised:
        load_spec(path)
    assert str(raised.value).splitlines()[0] == (
        "pipeline.yaml:7:43: expected at most 5 connections between cells, got 6 with these; give "
        "both stages the same axes, or fewer values"
    )
