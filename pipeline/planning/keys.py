"""Keys of cells: digests of everything that a cell's result depends on.

The key is the sha256 of the canonical JSON of the cell's ingredients: stage type, code, resolved
parameters, upstream keys, digests of external files and data, and a generation that `--force`
raises. Resources, retries, names and paths do not count; names are stored for people.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from pydantic import BaseModel, ConfigDict, with_config
from typing_extensions import TypedDict

from pipeline.base.shapes import Count, Lists, Texts
from pipeline.code.digest import CodeIndex
from pipeline.code.normal_form import RULE
from pipeline.planning.acceptance import Code, Equivalence
from pipeline.planning.outside import Reading, files_of, folders_of, name_of, read_file, read_folder
from pipeline.spec.cells import Cell, shorten
from pipeline.spec.params import Marked, marked
from pipeline.spec.plugins import Plugin
from pipeline.stage import ExternalFile, Registry, call_text

CODE_CHANGED = ("code of ", "the rule for code digests")  # prefixes of phrases of `explain`
_NOT_HASHED = {"names", "accepted", "rule"}


class _Names(TypedDict):
    inputs: Lists
    files: Texts
    unchecked: NotRequired[list[str]]


@with_config(ConfigDict(extra="allow"))
class Ingredients(TypedDict):
    """The stored ingredients of a key; see `Identity`."""

    stage: str
    code: Code
    rule: NotRequired[Count]
    params: dict[str, Any]
    inputs: Lists
    files: Texts
    data: Texts
    names: _Names
    generation: Count


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The key of a cell, and its ingredients.

    Attributes:
        key: hex sha256 of the ingredients.
        base: the same without the generation; `--force` counts generations per base.
        ingredients: JSON with `stage`, `code` {module: digest}, `params`, `inputs` {name: [key]},
            `files` {parameter: sha256}, `data` {parameter: digest} and `generation`. Not hashed
            are: `names`, with `inputs` {name: [cell]}, `files` {parameter: path} and `unchecked`
            [parameter], whose data has no digest in the key; `rule`, the version of the code digest
            (default 1); and `accepted`, the actual code where `code` is the code that replaces it
            (see `pipeline.planning.acceptance`).
    """

    key: str
    base: str
    ingredients: Mapping[str, Any]


def identify(
    cells: Iterable[Cell],
    plugins: Sequence[Plugin],
    generation: Callable[[Cell, str], int],
    equivalent: Callable[[str, Code], Equivalence | None] = lambda stage, code: None,
) -> dict[str, Identity]:
    """Return cell name -> identity.

    Missing or invalid modules and unreadable files are `BadInput`.

    Args:
        cells: in topological order.
        plugins: their packages contain the code.
        generation: cell and base identity -> generation.
        equivalent: stage type and code -> the code that replaces accepted code, or None.

    Cost: one read of each source, external file, and new file in folders of data.
    """
    code = CodeIndex(
        packages={
            *(name for plugin in plugins for name in plugin.catalogue.packages),
            *(
                stage.entry.split(":")[0].split(".")[0]
                for plugin in plugins
                for stage in plugin.catalogue.stages
            ),
        },
        declarations=[plugin.module for plugin in plugins],
    )
    digests = functools.cache(code.digests)
    content = functools.cache(lambda read, path: read(path).digest)
    found: dict[str, Identity] = {}
    for cell in cells:
        ingredients = _ingredients(cell, digests, content, found)
        known = equivalent(cell.declaration.name, ingredients["code"])
        if known:
            ingredients |= {"code": known.code, "accepted": known.accepted}
        base = _hash(ingredients)
        ingredients["generation"] = generation(cell, base)
        found[cell.name] = Identity(key=_hash(ingredients), base=base, ingredients=ingredients)
    return found


def _ingredients(
    cell: Cell,
    digests: Callable[[frozenset[str]], Mapping[str, str]],
    content: Callable[[Callable[[Path], Reading], Path], str],
    upstream: Mapping[str, Identity],
) -> dict[str, Any]:
    """Return a cell's ingredients without its generation."""
    params = cell.params.model_dump(mode="json")
    targets, data, unchecked = {cell.declaration.entry}, {}, []
    folders, paths = folders_of(cell.params), files_of(cell.params)
    for mark in marked(cell.params):
        name = name_of(mark)
        if isinstance(mark.marker, ExternalFile):
            _blank(params, mark.path)
        elif entry := mark.marker.find(mark.value):
            targets.add(entry.target)
            checked = False
            if entry.digest:
                data[name], checked = entry.digest, _is_verified(cell.params, mark)
            elif name in folders and folders[name].is_dir():
                data[name], checked = content(read_folder, folders[name]), True
            if mark.marker.data and not checked:
                unchecked.append(name)
    connected = {name: [source.cell for source in found] for name, found in cell.inputs.items()}
    return {
        "stage": cell.declaration.name,
        "code": digests(frozenset(targets)),
        "rule": RULE,
        "params": params,
        "inputs": {
            name: [upstream[source].key for source in sources]
            for name, sources in connected.items()
        },
        "files": {name: content(read_file, path) for name, path in paths.items()},
        "data": data,
        "names": {
            "inputs": connected,
            "files": {name: str(path) for name, path in paths.items()},
            "unchecked": unchecked,
        },
    }


def base_of(ingredients: Mapping[str, Any]) -> str:
    """Return `Identity.base` of ingredients."""
    return _hash({name: value for name, value in ingredients.items() if name != "generation"})


def _is_verified(params: BaseModel, mark: Marked) -> bool:
    """Tell whether the stage compares a declared digest: the parameter `verified_by` is not off."""
    marker = mark.marker
    switch = marker.verified_by if isinstance(marker, Registry) else ""
    return bool(getattr(_beside(params, mark), switch, True)) if switch else True


def _beside(params: BaseModel, mark: Marked) -> Any:
    """Return the container of a marked parameter."""
    found: Any = params
    for part in mark.path[:-1]:
        found = getattr(found, str(part)) if isinstance(found, BaseModel) else found[part]
    return found


def _blank(params: Any, path: Sequence[str | int]) -> None:
    """Replace a file's path by None: only the file's digest counts."""
    for part in path[:-1]:
        params = params[part]
    params[path[-1]] = None


def _hash(ingredients: Mapping[str, Any]) -> str:
    counted = {name: value for name, value in ingredients.items() if name not in _NOT_HASHED}
    text = json.dumps(counted, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def known_calls(cells: Iterable[Cell]) -> dict[str, frozenset[str]]:
    """Return cell name -> the calls that its parameters, and those upstream, name.

    Each call is a `pipeline.stage.call_text`, without and with its options. `cells` are in
    topological order.
    """
    known: dict[str, frozenset[str]] = {}
    for cell in cells:
        own = {text for mark in marked(cell.params) for text in _calls(cell.params, mark)}
        known[cell.name] = frozenset(own.union(*(known[source] for source in cell.sources)))
    return known


def own_calls(cell: Cell) -> Iterator[tuple[str, list[str]]]:
    """Yield each `module:function` parameter of a cell, with its `known_calls`."""
    for mark in marked(cell.params):
        registry = mark.marker
        entry = registry.find(mark.value) if isinstance(registry, Registry) else None
        if entry is not None and entry.target == mark.value:
            yield mark.value, list(_calls(cell.params, mark))


def _calls(params: BaseModel, mark: Marked) -> Iterator[str]:
    registry = mark.marker
    entry = registry.find(mark.value) if isinstance(registry, Registry) else None
    if entry is None or not isinstance(registry, Registry):
        return
    argument = registry.argument(mark.value)
    yield call_text(entry.target, argument)
    if registry.options:
        options = getattr(_beside(params, mark), registry.options, {})
        yield call_text(entry.target, argument, options)


# ------------------------------------------------------------------------- what has changed


def explain(
    before: Mapping[str, Any], after: Mapping[str, Any], cached: Container[str] = ()
) -> list[str]:
    """Return one phrase for each ingredient that differs.

    Args:
        before: ingredients of an earlier run of the cell.
        after: its ingredients now.
        cached: cells with stored results.
    """
    changes = []
    if before["stage"] != after["stage"]:
        changes.append(f"stage type: {before['stage']} -> {after['stage']}")
    changes += _entries("params", before["params"], after["params"])
    changes += _code(before, after)
    changes += _digests("file of params.{}", before["files"], after["files"])
    changes += _digests("data behind params.{}", before["data"], after["data"])
    changes += _upstream(before, after, cached)
    if before["generation"] < after["generation"]:
        changes.append("forced")
    return changes


def _code(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the changes of code; for accepted code, those of the actual code."""
    if before["code"] == after["code"]:
        return []
    rules = before.get("rule", 1), after.get("rule", 1)
    if rules[0] != rules[1]:
        return [
            f"the rule for code digests changed ({rules[0]} -> {rules[1]}); `fls accept` keeps the "
            "results"
        ]
    old, new = (one.get("accepted", one)["code"] for one in (before, after))
    name = "code of {}"
    return _digests(name, old, new) or _digests(name, before["code"], after["code"])


def _entries(name: str, before: Any, after: Any) -> Iterator[str]:
    """Yield `params.x: old -> new` for each leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from _entries(f"{name}.{key}", before.get(key), after.get(key))
    elif before != after:
        yield f"{name}: {json.dumps(before)} -> {json.dumps(after)}"


def _digests(name: str, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return up to three phrases: the digests that changed, came in, or went out."""
    both = [key for key in after if key in before and before[key] != after[key]]
    came = [key for key in after if key not in before]
    gone = [key for key in before if key not in after]
    return [
        f"{name.format(shorten(keys))} {verb}"
        for keys, verb in ((both, "changed"), (came, "came in"), (gone, "went out"))
        if keys
    ]


def _upstream(
    before: Mapping[str, Any], after: Mapping[str, Any], cached: Container[str]
) -> list[str]:
    """Return phrases about the upstream cells, by name, that changed, came in, or went out.

    A renamed cell with the same key in the same place is no change.
    """
    if before["inputs"] == after["inputs"]:
        return []
    old, new = _keys_by_name(before), _keys_by_name(after)
    other = [cell for cell in new if cell in cached and old.get(cell, new[cell]) != new[cell]]
    for cell in other:
        del old[cell], new[cell]
    found = _digests("upstream {}", old, new)
    if other:
        found.append(f"another stored result of upstream {shorten(other)}")
    return found or ["order of the upstream cells changed"]


def _keys_by_name(ingredients: Mapping[str, Any]) -> dict[str, str]:
    names = ingredients["names"]["inputs"]
    return {
        cell: key
        for name, keys in ingredients["inputs"].items()
        for cell, key in zip(names.get(name, ()), keys, strict=False)
    }
