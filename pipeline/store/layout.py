"""The layout of a store: this module makes and parses every path in it.

storage.json                         format, and a token that identifies the storage
.gitignore                           keeps a new store out of Git, and of Ray's launcher
stages/<key>/manifest.json           present means complete; names the published attempt
stages/<key>/attempts/<number>/      attempt.json, events/, log/, checkpoints/, outputs/; also
                                     failure.json of a failed attempt
stages/<key>/collected.json          the manifest of a result whose files were collected
stages/<key>.damaged-<n>/            a damaged result that was set aside
generations/<base>.<n>               the generation that --force raised
accepted/<id>.json                   code that counts as other code
runs/<run id>/<name>.json            documents of a run
runs/<run id>/marks/                 life-N: its N-th driver; stop-N: asks it to stop; alive
probe-<hex>/                         tests of the storage's abilities, removed at once
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.base.names import STAGES, numbers

FORMAT = 2
RUNS, GENERATIONS, ACCEPTED = "runs", "generations", "accepted"
OUTPUTS, CHECKPOINTS = "outputs", "checkpoints"
DIGESTS = ".digests.json"  # digests of a checkpoint's files, written after them
_KEY = re.compile(r"(?P<key>[^.]+)(?:\.damaged-(?P<aside>[0-9]+))?")
_GENERATION = re.compile(r"([^.]+)\.([0-9]{1,9})")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PROBE = re.compile(r"probe-[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}")  # of a file in the making or in deletion


def _path(template: str) -> Callable[..., str]:
    """Return the function that fills a template; another number of parts is a TypeError."""
    count = template.count("{")

    def make(*parts: object) -> str:
        if len(parts) != count:
            raise TypeError(f"{template}: expected {count} parts, got {len(parts)}")
        return template.format(*parts)

    return make


# The paths: functions of a key, the number of an attempt, and so on, in the order of the braces.
stage_folder = _path("stages/{}")
aside_name = _path("{}.damaged-{}")  # a key's damaged result of that number, in place of the key
manifest_path = _path("stages/{}/manifest.json")
collected_path = _path("stages/{}/collected.json")
attempts_folder = _path("stages/{}/attempts")
attempt_folder = _path("stages/{}/attempts/{:04d}")
output_folder = _path("stages/{}/attempts/{:04d}/outputs/{}")
checkpoints_folder = _path("stages/{}/attempts/{:04d}/checkpoints")
checkpoint_folder = _path("stages/{}/attempts/{:04d}/checkpoints/{:06d}")
events_folder = _path("stages/{}/attempts/{:04d}/events")
event_segment = _path("stages/{}/attempts/{:04d}/events/{:06d}.jsonl")
failure_path = _path("stages/{}/attempts/{:04d}/failure.json")
generation_path = _path("generations/{}.{}")
run_folder = _path("runs/{}")
run_document = _path("runs/{}/{}.json")
marks_folder = _path("runs/{}/marks")
run_mark = _path("runs/{}/marks/{}")
life_mark = _path("life-{}")
stop_mark = _path("stop-{}")


@dataclass(frozen=True)
class Place:
    """The place of a file in a store.

    Attributes:
        top: the first part of its path.
        name: the second part, such as `<key>`, `<key>.damaged-1` or a run's id; or "".
        key: the key, of a file below `stages/`; else "".
        aside: the number of its damaged result; None for a result in use.
        attempt: the number of its attempt, or None.
        part: its part of the attempt, such as `outputs` or `failure.json`.
        part_path: the path of that part.
        entry: the path one level below that part, such as a checkpoint's; or "".
    """

    top: str
    name: str = ""
    key: str = ""
    aside: int | None = None
    attempt: int | None = None
    part: str = ""
    part_path: str = ""
    entry: str = ""

    @property
    def folder(self) -> tuple[str, str]:
        """The first two parts of the path: one key, run or generation."""
        return self.top, self.name

    @property
    def is_probe(self) -> bool:
        """Whether it is a test of the storage's abilities."""
        return _PROBE.fullmatch(self.top) is not None


def parse(path: str) -> Place | None:
    """Return the place of a file in a store, or None for a foreign name.

    Foreign names at the top, such as `tracking`, have a place.

    >>> place = parse("stages/ab12/attempts/0003/checkpoints/000007/training.json")
    >>> place.key, place.attempt, place.part, place.entry
    ('ab12', 3, 'checkpoints', 'stages/ab12/attempts/0003/checkpoints/000007')
    >>> parse("stages/ab12/attempts/copy of 0003/attempt.json") is None
    True
    """
    top, *rest = path.split("/")
    name = rest[0] if rest else ""
    if top == RUNS:
        return Place(top, name) if len(rest) > 1 and _RUN_ID.fullmatch(name) else None
    if top == GENERATIONS:
        return Place(top, name) if _GENERATION.fullmatch(name) else None
    if top != STAGES:
        return Place(top, name)
    match = _KEY.fullmatch(name)
    if match is None:
        return None
    aside = int(match["aside"]) if match["aside"] else None
    if rest[1:2] != ["attempts"]:
        return Place(top, name, match["key"], aside)
    attempt = next(numbers(rest[2:3]), None)
    if attempt is None:
        return None
    part = rest[3] if len(rest) > 3 else ""
    part_path = "/".join([top, *rest[:4]])
    entry = f"{part_path}/{rest[4]}" if len(rest) > 4 else ""
    return Place(top, name, match["key"], aside, attempt, part, part_path, entry)


def find_temporary(path: str) -> str | None:
    """Return the part of a path up to a temporary name; None without one, or within outputs."""
    parts = path.split("/")
    for place, part in enumerate(parts):
        if part == OUTPUTS:
            return None
        if _TEMPORARY.fullmatch(part):
            return "/".join(parts[: place + 1])
    return None


def is_document(path: str) -> bool:
    """Tell whether a file is a document with a checksum, other than a manifest or a damaged one.

    Files below `tracking/` have no checksum: a submitted job writes JSON lines there.
    """
    place = parse(path) or Place(path.partition("/")[0])
    if place.top == "tracking" or place.aside is not None or path == manifest_path(place.key):
        return False
    private = place.part not in {OUTPUTS, CHECKPOINTS} and "/." not in path
    return private and path.endswith((".json", ".jsonl"))


def parse_generation(name: str) -> tuple[str, int] | None:
    """Return base identity and generation of a name in `generations/`, or None."""
    match = _GENERATION.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def parse_life(mark: str) -> int | None:
    """Return the number of the driver in the path or name of a life mark, or None."""
    _, found, number = mark.rpartition("life-")
    return next(numbers([number]), None) if found else None


def run_ids(names: Iterable[str]) -> list[str]:
    """Return the names that are valid run ids."""
    return [name for name in names if _RUN_ID.fullmatch(name)]


def asides(key: str, names: Iterable[str]) -> list[int]:
    """Return the numbers of a key's damaged results, given the names in `stages/`, ascending."""
    places = (parse(f"{STAGES}/{name}") for name in names)
    return sorted(one.aside for one in places if one and one.key == key and one.aside is not None)
