"""The names of the table's lines: the method, and the settings that tell a line from others.

Models that are equal but for their seeds are one line, and averaged. Models that differ in any
setting are separate lines, so that means are over seeds alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from stages.columns import Row, target_of
from stages.lineage import ARROW, BEST_OF, PATH, shown
from stages.report.rows import model_of, name_of, seeds_of, settings_of, stage_of

_EARLIER = "of an earlier version"


def labels_of(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Return a function that names the line of each of these rows."""
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(_kind(row), []).append(row)
    names: dict[str, str] = {}
    for same in kinds.values():
        names.update(_names(same))
    return lambda row: names[_identity(row)]


def _kind(row: Row) -> tuple[Any, ...]:
    """Return the kind of a row's model, which all lines under a heading share."""
    return row["mode"], row["finetuned"], name_of(row)


def _identity(row: Row) -> str:
    parts = [row["model_cell"], _kind(row), target_of(row), settings_of(row), seeds_of(row)]
    return json.dumps(parts, sort_keys=True)


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """Return row -> name, for rows of one kind."""
    paths: dict[str | None, list[Row]] = {}
    for row in rows:
        paths.setdefault(settings_of(row).get(PATH), []).append(row)
    turns = _turns(list(paths))
    details: dict[str, list[str]] = {}
    for path, same in paths.items():
        keys = _differing(same)
        short = _short_names(same)
        for row in same:
            known = settings_of(row)
            words = [_words(short[key], known[key]) for key in keys if key in known]
            details[_identity(row)] = [*([turns[path]] if len(paths) > 1 else []), *words]
    _tell_apart(rows, details)
    return {_identity(row): _joined(name_of(row), details[_identity(row)]) for row in rows}


def _joined(name: str, details: Sequence[str]) -> str:
    """Return a name with details in brackets.

    >>> _joined("obs", []), _joined("fls (tensor)", ["damping 0.1"])
    ('obs', 'fls (tensor, damping 0.1)')
    """
    if not details:
        return name
    start = f"{name[:-1]}, " if name.endswith(")") else f"{name} ("
    return f"{start}{', '.join(details)})"


def _differing(rows: Sequence[Row]) -> list[str]:
    """Return the settings in which rows of one kind and path differ.

    A grid that a value was chosen from may have been extended for one sparsity: grids count only
    where two rows of one place differ in them. In a row from before there were settings, a `select`
    may have chosen the damping for its place: it counts only where two rows of one place differ in
    it.
    """
    found = [settings_of(row) for row in rows]
    keys = dict.fromkeys(key for one in found for key in one)
    differing = [key for key in keys if len({_text(one.get(key)) for one in found}) > 1]
    chosen = [key for key in differing if all(_is_chosen(one.get(key)) for one in found)]
    others = [key for key in differing if key not in chosen]
    for key in chosen:
        grids: dict[str, set[str]] = {}
        for row, one in zip(rows, found, strict=True):
            place = _text([target_of(row), seeds_of(row), [one.get(other) for other in others]])
            grids.setdefault(place, set()).add(one[key])
        if all(len(same) == 1 for same in grids.values()):
            differing.remove(key)
    if "damping" in differing:
        places: dict[str, set[str]] = {}
        for row in rows:
            place = _text([row.get("structure"), target_of(row), seeds_of(row)])
            places.setdefault(place, set()).add(_text(row["damping"]))
        if all(len(dampings) == 1 for dampings in places.values()):
            differing.remove("damping")
    return differing


def _is_chosen(value: Any) -> bool:
    """Tell whether a setting's value was chosen from a grid."""
    return isinstance(value, str) and value.startswith(BEST_OF)


def _short_names(rows: Sequence[Row]) -> dict[str, str]:
    """Return setting -> its shortest name that is unique: without stage and method, or stage."""
    keys = {key for row in rows for key in settings_of(row)}
    names = {key: [key.rpartition(".")[2], key.partition(".")[2] or key] for key in keys}
    owners = Counter(name for candidates in names.values() for name in {*candidates})
    return {key: next((one for one in names[key] if owners[one] == 1), key) for key in keys}


def _words(name: str, value: Any) -> str:
    """Return a setting for people; the value of a structure needs no name."""
    text = shown(value)
    return text if name.rpartition(".")[2] == "structure" else f"{name} {text}"


def _turns(paths: Sequence[str | None]) -> dict[str | None, str]:
    """Return path -> the part from which it differs from the others."""
    parts = {path: path.split(ARROW) for path in paths if path is not None}
    common = 0
    while parts and len({tuple(one[: common + 1]) for one in parts.values()}) == 1:
        common += 1
        if any(len(one) == common for one in parts.values()):
            break
    turns: dict[str | None, str] = {None: _EARLIER}
    for path, one in parts.items():
        turns[path] = ARROW.join(one[min(common, len(one) - 1) :])
    return turns


def _tell_apart(rows: Sequence[Row], details: Mapping[str, list[str]]) -> None:
    """Add the stage's or the cell's name to rows that are equal in all else, even in seeds."""
    for name in (stage_of, lambda row: str(row["model_cell"])):
        for same in _collisions(rows, details):
            if len({name(row) for row in same}) > 1:
                line = list(details[_identity(same[0])])
                for row in rows:
                    if details[_identity(row)] == line:
                        details[_identity(row)].append(name(row))


def _collisions(rows: Iterable[Row], details: Mapping[str, list[str]]) -> list[list[Row]]:
    """Return the groups of different models that have one line, one target and the same seeds."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        place = _text([details[_identity(row)], target_of(row), seeds_of(row)])
        found.setdefault(place, {})[model_of(row)] = row
    return [list(models.values()) for models in found.values() if len(models) > 1]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
