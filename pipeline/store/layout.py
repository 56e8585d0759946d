"""The layout of a store: every path in it, made and parsed here.

storage.json                         format, and a token that tells storages apart
.gitignore                           keeps a new store out of Git, and of Ray's launcher
stages/<key>/manifest.json           present means complete; names the attempt that won
stages/<key>/attempts/<number>/      attempt.json, events/, log/, checkpoints/, outputs/
and, if it failed, failure.json
stages/<key>/collected.json          the manifest of a result whose files were collected
stages/<key>.damaged-<n>/            a damaged result that was set aside
generations/<base>.<n>               how often --force was asked for
accepted/<id>.json                   code that counts as other code
runs/<run id>/<name>.json            documents of a run
runs/<run id>/marks/                 life-N: its N-th driver; stop-N: that is to stop; alive
probe-<hex>/                         tests of what the storage can do, removed at once
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.base.names import numbers

FORMAT = 2
ABOUT = "storage.json"
STAGES, RUNS, GENERATIONS, ACCEPTED = "stages", "runs", "generations", "accepted"
OUTPUTS, CHECKPOINTS = "outputs", "checkpoints"
# Beside a checkpoint's files, and written after them: their digests.
DIGESTS = ".digests.json"
_KEY = re.compile(r"(?P<key>[^.]+)(?:\.damaged-(?P<aside>[0-9]+))?")
_GENERATION = re.compile(r"([^.]+)\.([0-9]{1,9})")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PROBE = re.compile(r"probe-[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}")  # the name under which a storage writes or deletes


def stage_folder(key: str, aside: int | None = None) -> str:
    """Return where all about a key is stored; with `aside`, its damaged result of that number."""
    return f"{STAGES}/{key}" if aside is None else f"{STAGES}/{key}.damaged-{aside}"


def manifest_path(key: str) -> str:
    """Return where the manifest of a key is stored."""
    return f"{stage_folder(key)}/manifest.json"


def collected_path(key: str) -> str:
    """Return where the manifest of a key is stored once the result's files were collected."""
    return f"{stage_folder(key)}/collected.json"


def attempts_folder(key: str, aside: int | None = None) -> str:
    """Return where the attempts at a key are stored."""
    return f"{stage_folder(key, aside)}/attempts"


def attempt_folder(key: str, number: int) -> str:
    """Return where an attempt is stored."""
    return f"{attempts_folder(key)}/{number:04d}"


def output_folder(key: str, number: int, output: str) -> str:
    """Return where an output of an attempt is stored."""
    return f"{attempt_folder(key, number)}/{OUTPUTS}/{output}"


def checkpoints_folder(key: str, number: int) -> str:
    """Return where the in-stage checkpoints of an attempt are stored."""
    return f"{attempt_folder(key, number)}/{CHECKPOINTS}"


def checkpoint_folder(key: str, number: int, checkpoint: int) -> str:
    """Return where one in-stage checkpoint of an attempt is stored."""
    return f"{checkpoints_folder(key, number)}/{checkpoint:06d}"


def events_folder(key: str, number: int) -> str:
    """Return where the events of an attempt are stored."""
    return f"{attempt_folder(key, number)}/events"


def event_segment(key: str, number: int, segment: int) -> str:
    """Return where a segment of an attempt's events is stored."""
    return f"{events_folder(key, number)}/{segment:06d}.jsonl"


def failure_path(key: str, number: int) -> str:
    """Return where the failure of an attempt is stored."""
    return f"{attempt_folder(key, number)}/failure.json"


def generation_path(base: str, generation: int) -> str:
    """Return where it is stored that a base identity was forced to a generation."""
    return f"{GENERATIONS}/{base}.{generation}"


def run_folder(run_id: str) -> str:
    """Return where all about a run is stored."""
    return f"{RUNS}/{run_id}"


def run_document(run_id: str, name: str) -> str:
    """Return where a document of a run is stored."""
    return f"{run_folder(run_id)}/{name}.json"


def marks_folder(run_id: str) -> str:
    """Return where the marks on a run are stored."""
    return f"{run_folder(run_id)}/marks"


def run_mark(run_id: str, mark: str) -> str:
    """Return where a mark on a run is stored."""
    return f"{marks_folder(run_id)}/{mark}"


def life_mark(life: int) -> str:
    """Return the mark of a run's driver, by its number."""
    return f"life-{life}"


def stop_mark(life: int) -> str:
    """Return the mark that asks a run's driver to stop, by its number."""
    return f"stop-{life}"


@dataclass(frozen=True)
class Place:
    """The place of a file in a store.

    Attributes:
        top: the first part of its path.
        name: the second part, such as `<key>`, `<key>.damaged-1` or a run's id; "" without one.
        key: the key, of a file below `stages/`; "" elsewhere.
        aside: the number of the damaged result that it belongs to; None of a result in use.
        attempt: the number of the attempt that it belongs to, or None.
        part: the part of the attempt that it belongs to, such as `outputs` or `failure.json`.
        part_path: the path of that part.
        entry: the path below that part's first level, such as a checkpoint's; "" of the part.
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
        """Whether it tests what the storage can do."""
        return _PROBE.fullmatch(self.top) is not None


def parse(path: str) -> Place | None:
    """Return the place of a file in a store, or None of a name that a store does not give.

    Names at the top that a store does not give, such as `tracking`, have a place.

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
    """Return the part of a path up to a temporary name, unless a stage may have chosen that."""
    parts = path.split("/")
    for place, part in enumerate(parts):
        if part == OUTPUTS:
            return None
        if _TEMPORARY.fullmatch(part):
            return "/".join(parts[: place + 1])
    return None


def is_document(path: str) -> bool:
    """Tell whether a file is a runner's document with a checksum, manifests and damaged ones apart.

    Files below `tracking/` are none: a submitted job writes JSON lines there.
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
    """Return the number of the driver that a path or a name of a mark is of, or None."""
    _, found, number = mark.rpartition("life-")
    return next(numbers([number]), None) if found else None


def run_ids(names: Iterable[str]) -> list[str]:
    """Return the names that may be ids of runs."""
    return [name for name in names if _RUN_ID.fullmatch(name)]


def asides(key: str, names: Iterable[str]) -> list[int]:
    """Return the numbers of a key's damaged results among the names in `stages/`, ascending."""
    places = (parse(f"{STAGES}/{name}") for name in names)
    return sorted(one.aside for one in places if one and one.key == key and one.aside is not None)
