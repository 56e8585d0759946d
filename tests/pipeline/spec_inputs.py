"""Inputs for the spec loader: valid specs, small ones and the project's, and what spoils them.

Everything is drawn from one `random.Random`, so that hypothesis, atheris and a plain seed can all
drive it.
"""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.base.errors import BadInput, SpecError
from pipeline.base.text import CONTROLS
from pipeline.spec.load import load_spec

ROOT = Path(__file__).parents[2]
REAL = [ROOT / "pipeline.yaml", *sorted(ROOT.glob("experiments/*.yaml"))]
_AMOUNTS = [0, 1, -2, 0.5, 1e-3, True, None, "plus", "${vars.x}", "${vars.y.z}", "${env.NOPE:-3}"]
_WEIRD: list[Any] = [
    10**30, -(10**400), 2**64, "0x" + "f" * 80, ".nan", ".inf", "1e999", "", " ", "\x00", "\x1b[2J",
    "\u202e", "ａｄｄ", "а", "é", "e\u0301", "../../x", "/etc/passwd", "a/../b", "~", "a" * 500,
    "${vars.x}${vars.x}", "${vars.vars}", "${vars.}", "${", "${}", "${env.}", "${env.HF_TOKEN}",
    "${env.PATH}", "${vars.x.y.z}", [], {}, [[]], [{}], {"": 1}, [1] * 300, {"<<": {"a": 1}},
    ["start"] * 3, "start", ["start", "add"], "toy.operations:plus", "os:system", ":", "a:", "..:x",
    "4GB", "9" * 400 + "GB", "1e400GB", True, None, -1, 1e308, 5e-324,
]  # fmt: skip
_FRAGMENTS = [
    b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system x", b"!x ", b"? ", b"- ", b"---\n",
    b"...\n", b"%YAML 1.2\n", b"%YAML 99999999999999999999.1\n", b"%TAG ! x\n", b"\x00", b"\xff",
    b"\xc3", b"\xe2\x80\xae", b"\xef\xbb\xbf", b"\x1b[31m", b"\r", b"\t", b'"\\ud800"',
    b'"\\UFFFFFFFF"', b'"\\x0"', b"|\n", b">9\n", b"{", b"}", b"[", b"]", b",", b": ", b"#", b"'",
    b'"', b"\\", b"${vars.x}", b"\n", b"\xc2\x85", b"!<", b"9" * 50, b"[" * 40, b"{a: " * 40,
    b"a: &b [*b, *b]\n", b".nan", b"0x",
]  # fmt: skip


def valid_spec(rng: random.Random) -> dict[str, Any]:
    """Draw a spec that has no mistakes."""
    seeds = rng.sample(range(9), rng.randint(1, 4))
    stages: dict[str, Any] = {
        "start": {
            "uses": "start",
            "matrix": {"seed": seeds},
            "params": {"value": rng.randint(0, 9)},
        }
    }
    numbers = ["start"]
    for index in range(rng.randint(0, 5)):
        name = f"s{index}"
        stages[name] = {
            "uses": "add",
            "matrix": {
                "seed": "${vars.seeds}",
                "amount": rng.sample([1, 2, 0.5], rng.randint(1, 3)),
            },
            "inputs": {"number": "start"},
            "retries": rng.randint(0, 3),
            "resources": {"num_cpus": rng.choice([0, 1, 0.5]), "memory": rng.choice(["1GB", 5])},
        }
        numbers.append(name)
    stages["total"] = {"uses": "total", "inputs": {"numbers": numbers}}
    stages["report"] = {"uses": "report", "inputs": {"results": "total"}}
    return {"name": "toy", "plugins": ["toy"], "vars": {"seeds": seeds}, "stages": stages}


def mutate_structure(rng: random.Random, spec: dict[str, Any]) -> None:
    """Change one place of a spec: a value, a key, an entry more or less."""
    places = list(_places(spec))
    folder, key = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0:
        folder[key] = rng.choice(_WEIRD + _AMOUNTS)
    elif kind == 1:
        del folder[key]
    elif kind == 2 and isinstance(folder, dict):
        folder[rng.choice(["sedd", "uses", "x" * 300, "é", "<<", "params", ""])] = folder[key]
    elif kind == 3:
        other, there = rng.choice(places)
        folder[key] = yaml.safe_load(yaml.safe_dump(_get(other, there)))
    elif kind == 4:
        folder[key] = [folder[key]] if rng.random() < 0.5 else {"x": folder[key]}
    elif kind == 5 and isinstance(folder, list):
        folder += folder
    else:
        spec.setdefault("vars", {})
        if isinstance(spec["vars"], dict):
            spec["vars"][rng.choice(["x", "y", "vars"])] = rng.choice(_WEIRD + _AMOUNTS)


def _get(folder: Any, key: Any) -> Any:
    try:
        return folder[key]
    except (KeyError, IndexError):
        return None


def _places(value: Any) -> Any:
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(entries):
        yield value, key
        if isinstance(child, dict | list) and child:
            yield from _places(child)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change a few bytes: flip, drop, double, repeat very often, or put in a piece of YAML."""
    text = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(text))
        to = min(len(text), at + rng.randint(0, 12))
        kind = rng.randrange(6)
        if kind == 0 and at < len(text):
            text[at] = rng.randrange(256)
        elif kind == 1:
            del text[at:to]
        elif kind == 2:
            text[at:at] = text[at:to] * rng.choice([1, 2, 50])
        elif kind == 3:
            text[at:at] = rng.choice(_FRAGMENTS)
        elif kind == 4:
            text[at:at] = rng.choice(_FRAGMENTS) * rng.choice([2, 10, 1000])
        else:
            text[at:at] = text[rng.randint(0, len(text)) :][: rng.choice([20, 500])]
    return bytes(text)


def draw_input(rng: random.Random) -> bytes:
    """Draw what is given to the loader: a spec, more or less spoilt, or just bytes."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randint(0, 200))
    if kind == 1:
        return b"".join(rng.choice(_FRAGMENTS) for _ in range(rng.randint(1, 30)))
    spec = valid_spec(rng)
    if rng.random() < 0.3:
        spec = yaml.safe_load(rng.choice(REAL).read_text(encoding="utf-8"))
    if kind < 8:
        for _ in range(rng.randint(0, 3)):
            try:
                mutate_structure(rng, spec)
            except (IndexError, RecursionError):  # nothing left, or a structure within itself
                break
    try:
        data = yaml.safe_dump(
            spec, sort_keys=False, allow_unicode=rng.random() < 0.5,
            default_flow_style=rng.choice([True, False, None]),
        ).encode()  # fmt: skip
    except RecursionError:
        data = b"a: &a [*a]\n"
    return mutate_bytes(rng, data) if kind >= 5 else data


# ---------------------------------------------------------------------------- the judgement

_PLACE = re.compile(r"^(\S*p\.yaml:\d+:\d+: .|cannot read |Stopped after \d+ problems)")


@dataclass(frozen=True)
class Verdict:
    """What the loader made of an input: `valid`, or the error's class; and the CPU seconds."""

    kind: str
    seconds: float


def judge(data: bytes, path: Path) -> Verdict:
    """Load `data` as the spec at `path`; anything but a spec or a clear error is raised."""
    path.write_bytes(data)
    return judge_call(lambda: load_spec(path))


def judge_call(call: Callable[[], object]) -> Verdict:
    began = time.process_time()
    kind = "valid"
    try:
        call()
    except (SpecError, BadInput) as error:
        kind = type(error).__name__
        for line in str(error).split("\n"):
            if not _PLACE.match(line) or CONTROLS.search(line) or len(line) > 1_500:
                raise AssertionError(f"no clear error: {line!r}") from error
    return Verdict(kind, time.process_time() - began)
