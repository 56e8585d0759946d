"""What a store holds that nothing needs any more, and how it is deleted.

Needed is what a kept run or the present plan of a pipeline reaches, and everything of cells that
are being worked on: those of a live run, and those that were written to of late. The rest goes:
results that nothing reaches, files that only served what is there by now (`keep: results`), what
ended attempts left behind, results set aside as damaged, files of writes and uploads that were
killed, workspaces of killed workers on this machine, and generations that no cell has.

A run may start while this works. So whatever was written to within the grace period stays; and
before each thing is deleted it is looked at again, and so are the runs. What is left is a run that
planned before and writes its plan after that second look: it finds a result gone, and makes it
again, as it does with a damaged one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.base.errors import BadInput, DamagedDocument, StorageUnavailable, StoreError
from pipeline.base.names import numbers, require_inside, run_ids
from pipeline.planning.keys import base_of
from pipeline.planning.planner import Plan
from pipeline.running.record import DOCUMENTS, RunRecord, RunState, load_run
from pipeline.store.attempt import DIGESTS, attempt_folder, whole_checkpoints
from pipeline.store.storage import StoredFile
from pipeline.store.store import Manifest, Store

_RESULT = re.compile(r"(?P<key>[^.]+)(?P<damaged>\.damaged-[0-9]+)?")
_GENERATION = re.compile(r"[^.]+\.[0-9]{1,9}")
_STRAY = re.compile(r"\.[0-9a-f]{32}")  # what a storage writes or deletes under another name
_PROBE = re.compile(r"probe-[0-9a-f]{32}")
GRACE_S = 3600.0
_CHECKPOINTS = 2  # that a stage keeps, see `Context.checkpoint`


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which runs are kept, and how long what was just written to is left alone.

    A run is dropped if every limit that is given drops it; without any, all runs are kept. A live
    run is always kept, and so is one that is not yet recorded where it is tracked.

    Attributes:
        keep_runs: so many of the newest runs are kept, or None.
        older_than_s: runs that began within so many seconds are kept, or None.
        grace_s: the grace period.
    """

    keep_runs: int | None = None
    older_than_s: float | None = None
    grace_s: float = GRACE_S


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One thing that is not needed.

    Attributes:
        paths: what is deleted, in this order: first what makes the rest count as whole.
        bytes: its size.
        written: Unix time of the last write to it.
        reason: why it is not needed.
        cell: name of the cell that it is of, or "".
        manifest: of the result that it is the files of; what that says is kept. None otherwise.
        discard: how it is deleted, if it lies where no listing shows it. None otherwise.
    """

    paths: Sequence[str]
    bytes: int
    written: float
    reason: str
    cell: str = ""
    manifest: Manifest | None = None
    discard: Callable[[], object] | None = None

    def to_dict(self, *, deleted: bool) -> dict[str, Any]:
        """Return what it is, as JSON has it."""
        what = {"path": self.paths[-1], "cell": self.cell, "bytes": self.bytes}
        return {**what, "written": self.written, "reason": self.reason, "deleted": deleted}


def find_garbage(
    store: Store,
    plans: Sequence[Plan],
    retention: Retention,
    pass_over: Callable[[str], object] = lambda path: None,
) -> list[Garbage]:
    """Return what is not needed; nothing is written.

    Args:
        store: the store.
        plans: present plans of pipelines, whose results are kept.
        retention: which runs are kept.
        pass_over: told of each file whose name a store does not give, and of each run that a limit
            would drop although a process works for it or it is not recorded yet; all are left
            alone.

    Where the documents of a run cannot be read, what it needs is not known: a `StoreError`.

    Cost: a listing of the whole storage; a read of each run's documents, and of the manifests of
    results that nothing reaches or that more than one attempt was made at.
    """
    survey = _Survey(store, retention)
    for path in survey.strange:
        pass_over(f"{path}: no name that a store gives")
    pipelines = {plan.spec.name for plan in plans}
    survey.judge_runs(pipelines)
    for run_id, why in survey.kept.items():
        pass_over(f"run {run_id} {why}")
    for plan in plans:
        survey.need_plan(plan)
    return list(survey.garbage())


def find_spared(
    store: Store, plans: Sequence[Plan], retention: Retention, found: Iterable[Garbage]
) -> list[Garbage]:
    """Return what is spared for the grace period alone: it is not needed, and not in `found`.

    Args:
        store: the store.
        plans: as for `find_garbage`.
        retention: as for `find_garbage`.
        found: what that returned.

    Cost: that of `find_garbage`.
    """
    known = {item.paths for item in found}
    later = find_garbage(store, plans, replace(retention, grace_s=0.0))
    return [item for item in later if item.paths not in known]


def collect(
    store: Store,
    plans: Sequence[Plan],
    retention: Retention,
    garbage: Iterable[Garbage],
    pass_over: Callable[[str], object] = lambda path: None,
) -> Iterator[Garbage]:
    """Delete garbage, and yield each thing that was; what is in use by now is spared.

    `pass_over` is told of what cannot be deleted, such as what is another user's.

    Raises:
        StorageUnavailable: the storage is away.

    Cost: a listing of each thing; and a survey at the beginning, and whenever something changed.
    """
    runs = set(store.list_runs())
    wanted = {item.paths for item in find_garbage(store, plans, retention)}
    for item in garbage:
        now = set(store.list_runs())
        try:
            if item.discard is not None:  # by a dead process, or long ago: unused
                item.discard()
                yield item
                continue
            files = [file for path in item.paths for file in store.storage.files(path)]
            if now - runs or _newest(files) != item.written:
                runs |= now
                wanted = {other.paths for other in find_garbage(store, plans, retention)}
            if item.paths not in wanted:
                continue
            if item.manifest is not None:
                store.collect(item.manifest)
            for path in item.paths:
                store.storage.remove(path)
        except StorageUnavailable:
            raise
        except StoreError as error:
            pass_over(str(error))
        else:
            yield item


def _why_keep(record: RunRecord) -> str | None:
    """Return why a run that is over must not be dropped, or None."""
    if record.is_attended():
        return f"is kept: process {record.pid} on {record.host} is recording it"
    if not record.tracked and record.destination:
        return f"is kept: {record.destination} has not all of it; `{record.sync_command}` sends it"
    return None


def _newest(files: Iterable[StoredFile]) -> float:
    return max((file.time for file in files), default=0.0)


@dataclass
class _Needs:
    """What is needed: keys, those that are being worked on, and base identities.

    Of some keys the files only served what is there by now; of `whole` ones they are needed all
    the same, for another pipeline, or for a run that is not done.
    """

    keys: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    bases: set[str] = field(default_factory=set)
    served: dict[str, Manifest] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)


class _Survey:
    """One look at the whole store."""

    def __init__(self, store: Store, retention: Retention):
        self.store = store
        self.retention = retention
        self.now = store.now()
        self.needs = _Needs()
        self.names: dict[str, str] = {}  # key -> cell
        self.dropped: dict[str, str] = {}  # run -> reason
        self.kept: dict[str, str] = {}  # run that a limit would drop -> why it does not
        self.groups: dict[tuple[str, str], list[StoredFile]] = defaultdict(list)
        self.strays: dict[str, list[StoredFile]] = defaultdict(list)
        self.strange: list[str] = []
        for file in store.storage.files(""):
            stray = _stray(file.path)
            if file.leads_on or not _is_inside(file.path):
                self.strange.append(file.path)
            elif stray:
                self.strays[stray].append(file)
            elif not _is_ours(file.path):
                self.strange.append(file.path)
            else:
                top, _, rest = file.path.partition("/")
                self.groups[top, rest.partition("/")[0]].append(file)

    def is_old(self, files: Iterable[StoredFile]) -> bool:
        """Tell whether nothing was written within the grace period."""
        return self.now - _newest(files) >= self.retention.grace_s

    # -- what is needed

    def judge_runs(self, pipelines: Collection[str]) -> None:
        """Decide which runs are kept, and note what they need.

        Args:
            pipelines: names of those whose present plans say which files have served.

        Raises:
            StoreError: the documents of a run cannot be read.
        """
        records = []
        for run_id in [name for top, name in self.groups if top == "runs"]:
            files = self.groups["runs", run_id]
            names = {file.path.rpartition("/")[2] for file in files}
            begun = names.issuperset(f"{name}.json" for name in DOCUMENTS)
            if not begun and self.is_old(files):
                self.dropped[run_id] = "a run that was killed before it began"
                continue
            try:
                plan, state = self.documents(run_id)
                if begun:
                    records.append((load_run(self.store, run_id), plan, state))
                else:
                    self.need_documents(plan, state, live=True)
            except (BadInput, DamagedDocument) as error:
                raise StoreError(
                    f"{error}\nSo what run {run_id} needs is not known. Delete the folder "
                    f"runs/{run_id} of {self.store.url} if you can do without the run."
                ) from error
        records.sort(key=lambda found: found[0].run_id, reverse=True)
        for place, (record, plan, state) in enumerate(records):
            live = self.is_live(record)
            reason = None if live else self.why_drop(record, place)
            if reason and (why := _why_keep(record)):
                self.kept[record.run_id] = why
                reason = None
            if reason:
                self.dropped[record.run_id] = reason
                self.names |= {entry["key"]: cell for cell, entry in plan["cells"].items()}
            else:
                self.need_documents(plan, state, live=live)
                done = record.state is RunState.DONE
                self.needs.whole |= {
                    entry["key"]
                    for entry in plan["cells"].values()
                    if not done or (plan["pipeline"] not in pipelines and entry["keep"] == "all")
                }

    def documents(self, run_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the plan and the state of a run, empty if it has none."""
        plan = self.store.read_run(run_id, "plan") or {"pipeline": "", "cells": {}}
        return plan, self.store.read_run(run_id, "state") or {"cells": []}

    def is_live(self, record: RunRecord) -> bool:
        """Tell whether a run works, or is silent for so short a time that it may yet go on."""
        recent = record.silence_s() < self.retention.grace_s
        return record.observed_state() is RunState.RUNNING or (
            record.state is RunState.RUNNING and recent
        )

    def why_drop(self, record: RunRecord, place: int) -> str | None:
        """Return why a run, the `place`-th newest from 0, is dropped; None if it is kept."""
        keep, age_s = self.retention.keep_runs, self.retention.older_than_s
        reasons = []
        if keep is not None:
            reasons.append(f"a run before the newest {keep}" if place >= keep else "")
        if age_s is not None:
            days = (self.now - record.began) / 86400
            reasons.append(f"a run of {days:.1f} days ago" if days * 86400 > age_s else "")
        return reasons[0] if reasons and all(reasons) else None

    def need_documents(
        self, plan: Mapping[str, Any], state: Mapping[str, Any], *, live: bool
    ) -> None:
        """Note what a run needs: what it planned, and what it made of fewer inputs than planned."""
        keys = {entry["key"]: cell for cell, entry in plan["cells"].items()}
        keys |= {status["key"]: status["cell"] for status in state["cells"]}
        self.names |= keys
        self.needs.keys |= keys.keys()
        if live:
            self.needs.busy |= keys.keys()
        self.needs.bases |= {base_of(entry["ingredients"]) for entry in plan["cells"].values()}

    def need_plan(self, plan: Plan) -> None:
        """Note what a pipeline needs as it is now."""
        served = _served(plan)
        self.needs.served |= served
        for one in plan.cells:
            self.names[one.key] = one.cell.name
            self.needs.keys.add(one.key)
            self.needs.bases.add(base_of(one.ingredients))
            if one.key not in served:
                self.needs.whole.add(one.key)

    # -- what is not

    def garbage(self) -> Iterator[Garbage]:
        """Yield all that is not needed; runs first, so that none is left without its results."""
        for run_id, reason in self.dropped.items():
            yield self.item([f"runs/{run_id}"], self.groups["runs", run_id], reason)
        for path, files in self.strays.items():
            if self.is_old(files):
                yield self.item([path], files, "left by a write or a deletion that was killed")
        for left in self.store.storage.leftovers():
            top, _, rest = left.path.partition("/")
            of = top, rest.partition("/")[0]
            quiet = self.is_old(self.groups.get(of, ())) and of[1] not in self.needs.busy
            if quiet and self.now - left.time >= self.retention.grace_s:
                why = "left by a worker that was killed"
                found = self.item([left.path], [], why)
                yield replace(found, bytes=left.bytes, written=left.time, discard=left.discard)
        for (top, name), files in self.groups.items():
            if not self.is_old(files):
                continue
            if _PROBE.fullmatch(top):
                yield self.item([top], files, "left by a start that was killed")
            elif top == "generations":
                yield from self.generation(name, files)
            elif top == "stages":
                yield from self.result(name, files)

    def item(
        self, paths: Sequence[str], files: Sequence[StoredFile], reason: str, key: str = ""
    ) -> Garbage:
        """Return a thing to delete."""
        return Garbage(
            paths=tuple(paths),
            bytes=sum(file.bytes for file in files),
            written=_newest(files),
            reason=reason,
            cell=self.names.get(key, ""),
        )

    def generation(self, name: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield a generation that no cell has."""
        base, _, number = name.partition(".")
        if base not in self.needs.bases:
            yield self.item([f"generations/{name}"], files, "no cell that was forced is left")
        elif ("generations", f"{base}.{int(number) + 1}") in self.groups:
            yield self.item([f"generations/{name}"], files, "was forced again since")

    def result(self, name: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield what is not needed of `stages/<name>`."""
        match = _RESULT.fullmatch(name)
        if match is None or match["key"] in self.needs.busy:
            return
        key, folder = match["key"], f"stages/{name}"
        if key not in self.needs.keys:
            self.learn_name(key)
            why = "set aside as damaged" if match["damaged"] else "no kept run or plan reaches it"
            yield self.item([f"{folder}/manifest.json", folder], files, why, key)
        elif match["damaged"]:
            yield from self.damaged(key, folder, files)
        else:
            yield from self.leftovers(key, folder, files)

    def learn_name(self, key: str) -> None:
        """Look into the manifest of a result whose name no run tells."""
        if key not in self.names:
            manifest = self.manifest(key)
            if isinstance(manifest, Manifest):
                self.names[key] = str(manifest.facts.get("cell", ""))

    def manifest(self, key: str) -> Manifest | StoreError | None:
        """Return the manifest of a result, None if there is none, or what is wrong with it.

        Raises:
            StorageUnavailable: that is not known.
        """
        try:
            return self.store.manifest(key)
        except StorageUnavailable:
            raise
        except StoreError as error:  # damaged, or a link that leads out of the store
            return error

    def damaged(self, key: str, folder: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield a result set aside; the records of its attempts stay until later ones have come.

        Otherwise an attempt's number might be used twice.
        """
        numbers = _parts(files, folder)
        later = _parts(self.groups.get(("stages", key), ()), f"stages/{key}")
        if max(numbers, default=0) < max(later, default=0):
            yield self.item([folder], files, "set aside as damaged, and made again since", key)
            return
        for parts in numbers.values():
            for path, found in parts.items():
                yield self.item([path], found, "set aside as damaged", key)

    def leftovers(self, key: str, folder: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield what attempts left at a key that is needed."""
        numbers = _parts(files, folder)
        if not any(numbers.values()):
            return
        manifest = self.manifest(key)
        if isinstance(manifest, StoreError):
            return
        if manifest is None:
            yield from self.unfinished(key, numbers)
            return
        served = key in self.needs.served.keys() - self.needs.whole
        for number, parts in numbers.items():
            for path, found in parts.items():
                if served and path == f"{folder}/attempts/{manifest.attempt:04d}/outputs":
                    why = "all that was to be made of it is there (keep: results)"
                    yield replace(self.item([path], found, why, key), manifest=manifest)
                elif number != manifest.attempt or path.endswith("/checkpoints"):
                    yield self.item([path], found, "the result is complete without it", key)

    def unfinished(
        self, key: str, numbers: Mapping[int, Mapping[str, Sequence[StoredFile]]]
    ) -> Iterator[Garbage]:
        """Yield what the next attempt at a key will not go on from."""
        useful: dict[str, str] = {}  # checkpoint -> its newest copy
        for number in sorted(numbers):
            if f"{attempt_folder(key, number)}/checkpoints" in numbers[number]:
                whole = whole_checkpoints(self.store.storage, key, number)
                useful |= {path.rpartition("/")[2]: path for path in whole}
        kept = {useful[name] for name in sorted(useful)[-_CHECKPOINTS:]}
        for parts in numbers.values():
            for path, files in parts.items():
                if path.endswith("/outputs"):
                    yield self.item([path], files, "its attempt has ended", key)
                    continue
                for entry, found in _entries(path, files).items():
                    if entry not in kept:
                        paths = [f"{entry}/{DIGESTS}", entry]
                        yield self.item(paths, found, "a newer checkpoint is there", key)


def _served(plan: Plan) -> dict[str, Manifest]:
    """Return key -> manifest of the results whose files only served what is there by now.

    A cell that shares its key with one that is not so does not count.
    """
    waiting: set[str] = set()  # cells that are incomplete, or have such a one downstream
    taken: set[str] = set()
    found: dict[str, Manifest] = {}
    kept: set[str] = set()
    for one in reversed(plan.cells):
        outputs = one.cell.declaration.outputs.values()
        result = any(output.track or output.promote for output in outputs)
        name = one.cell.name
        if one.state != "cached" or name in waiting:
            waiting.update([name, *one.cell.sources])
        taken.update(one.cell.sources)
        served = one.cell.keep == "results" and name in taken and name not in waiting
        if served and one.manifest and not one.collected and not result:
            found[one.key] = one.manifest
        else:
            kept.add(one.key)
    return {key: manifest for key, manifest in found.items() if key not in kept}


def _is_inside(path: str) -> bool:
    try:
        require_inside(path)
    except StoreError:
        return False
    return True


def _is_ours(path: str) -> bool:
    """Tell whether a store gives such names; top-level ones that it does not give are not met."""
    match path.split("/"):
        case ["runs", name, *rest]:
            return bool(rest and run_ids([name]))
        case ["generations", name, *_]:
            return _GENERATION.fullmatch(name) is not None
        case ["stages", name, "attempts", number, *_]:
            return bool(_RESULT.fullmatch(name) and list(numbers([number])))
        case ["stages", name, *_]:
            return _RESULT.fullmatch(name) is not None
    return True


def _stray(path: str) -> str | None:
    """Return the part of a path up to a temporary name, unless a stage may have chosen that."""
    parts = path.split("/")
    for place, part in enumerate(parts):
        if part == "outputs":
            return None
        if _STRAY.fullmatch(part):
            return "/".join(parts[: place + 1])
    return None


def _parts(files: Iterable[StoredFile], folder: str) -> dict[int, dict[str, list[StoredFile]]]:
    """Return attempt -> path of its outputs or checkpoints -> files there."""
    found: dict[int, dict[str, list[StoredFile]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        match file.path[len(folder) + 1 :].split("/"):
            case ["attempts", number, "outputs" | "checkpoints" as part, _, *_]:
                found[int(number)][f"{folder}/attempts/{number}/{part}"].append(file)
            case ["attempts", number, *_]:
                found[int(number)]  # noqa: B018 - an attempt that has left nothing is one too
    return found


def _entries(folder: str, files: Iterable[StoredFile]) -> dict[str, list[StoredFile]]:
    """Return checkpoint -> its files."""
    found: dict[str, list[StoredFile]] = defaultdict(list)
    for file in files:
        name = file.path[len(folder) + 1 :].partition("/")[0]
        found[f"{folder}/{name}"].append(file)
    return found
