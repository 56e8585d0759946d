"""Garbage collection of a store.

Kept are the results that a kept run or a current plan reaches, everything of cells in live runs,
and recently written files. Garbage are unreachable results, files of `keep: results` cells whose
downstream cells are complete, remains of ended attempts, damaged results set aside, files of killed
writes and uploads, workspaces of killed workers on this machine, and unused generations.

A run may start meanwhile. So files written within the grace period stay, and each item and the list
of runs are checked again before a deletion. A run that planned before and records its plan after
this check finds a result missing, and computes it again like a damaged one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.base.errors import StorageUnavailable, StoreError
from pipeline.planning.planner import Plan
from pipeline.store import layout
from pipeline.store.attempt import whole_checkpoints
from pipeline.store.manifest import Manifest
from pipeline.store.storage.base import StoredFile
from pipeline.store.store import Store
from pipeline.upkeep.needs import Needs
from pipeline.upkeep.survey import Retention, Survey, newest

_ASIDE = "set aside as damaged"
_CHECKPOINTS = 2  # kept by a stage, see `Context.checkpoint`
Part = tuple[str, str]  # path and name of a part of an attempt


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """An item to delete.

    Attributes:
        paths: deleted in this order, so the manifest or digests that mark a whole item go first.
        bytes: its size.
        written: Unix time of the last write to it.
        reason: why it is not needed.
        cell: name of its cell, or "".
        manifest: the manifest to keep, if the item is the files of a result.
        discard: deletes an item that no listing shows.
    """

    paths: Sequence[str]
    bytes: int
    written: float
    reason: str
    cell: str = ""
    manifest: Manifest | None = None
    discard: Callable[[], object] | None = None

    def to_dict(self, *, deleted: bool) -> dict[str, Any]:
        """Return it as JSON data."""
        item = {"path": self.paths[-1], "cell": self.cell, "bytes": self.bytes}
        return {**item, "written": self.written, "reason": self.reason, "deleted": deleted}


def find_garbage(
    store: Store,
    plans: Sequence[Plan],
    retention: Retention,
    pass_over: Callable[[str], object] = lambda path: None,
) -> list[Garbage]:
    """Return the garbage; writes nothing. Damaged documents of a run are a `StoreError`.

    Args:
        store: the store.
        plans: current plans of pipelines, whose results are kept.
        retention: the rule for runs.
        pass_over: called with a message for each foreign file, and each run that a limit would drop
            but that is in use or not yet tracked; all of them are kept.

    Cost: a listing of the whole storage; a read of each run's documents, and of the manifests of
    unreachable results and of those with several attempts.
    """
    survey = Survey(store, retention)
    for path in survey.strange:
        pass_over(f"{path}: no name that a store gives")
    needs = Needs(survey)
    needs.judge_runs({plan.spec.name for plan in plans})
    for run_id, why in needs.kept.items():
        pass_over(f"run {run_id} {why}")
    for plan in plans:
        needs.need_plan(plan)
    return list(_Finder(survey, needs).garbage())


def find_spared(
    store: Store, plans: Sequence[Plan], retention: Retention, found: Iterable[Garbage]
) -> list[Garbage]:
    """Return the garbage that only the grace period spares: not in `found` by `find_garbage`."""
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
    """Delete garbage that is still unused, and yield each deleted item.

    `pass_over` is called with a message for each failure, such as of another user's files.

    Raises:
        StorageUnavailable: the storage is away.

    Cost: a listing of each item; a survey at the beginning and after each change.
    """
    runs = set(store.list_runs())
    wanted = {item.paths for item in find_garbage(store, plans, retention)}
    for item in garbage:
        now = set(store.list_runs())
        try:
            if item.discard is not None:  # of a dead process, or old
                item.discard()
                yield item
                continue
            files = [file for path in item.paths for file in store.storage.files(path)]
            if now - runs or newest(files) != item.written:
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


class _Finder:
    """Finds the garbage of a store."""

    def __init__(self, survey: Survey, needs: Needs):
        self.survey = survey
        self.needs = needs

    def garbage(self) -> Iterator[Garbage]:
        """Yield all garbage; runs first, so that none remains without its results."""
        for run_id, reason in self.needs.dropped.items():
            yield self.item(
                [layout.run_folder(run_id)], self.survey.folders[layout.RUNS, run_id], reason
            )
        for path, files in self.survey.temporary.items():
            if self.survey.is_old(files):
                yield self.item([path], files, "left by a write or a deletion that was killed")
        for left in self.survey.store.storage.leftovers():
            place = layout.parse(left.path)  # None of a folder on this machine
            files = self.survey.folders.get(place.folder, []) if place else []
            quiet = self.survey.is_old(files) and not (place and place.key in self.needs.busy)
            if quiet and self.survey.now - left.time >= self.survey.retention.grace_s:
                why = "left by a worker that was killed"
                found = self.item([left.path], [], why)
                yield replace(found, bytes=left.bytes, written=left.time, discard=left.discard)
        for (top, name), files in self.survey.folders.items():
            if not self.survey.is_old(files):
                continue
            place = layout.parse(files[0].path)
            if place is None:
                continue
            if place.is_probe:
                yield self.item([top], files, "left by a start that was killed")
            elif top == layout.GENERATIONS:
                yield from self.generation(name, files)
            elif place.key and place.key not in self.needs.busy:
                yield from self.result(place, files)

    def item(
        self, paths: Sequence[str], files: Sequence[StoredFile], reason: str, key: str = ""
    ) -> Garbage:
        """Return an item to delete."""
        return Garbage(
            paths=tuple(paths),
            bytes=sum(file.bytes for file in files),
            written=newest(files),
            reason=reason,
            cell=self.needs.names.get(key, ""),
        )

    def generation(self, name: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield a generation that no cell has."""
        base, number = layout.parse_generation(name) or ("", 0)
        path = f"{layout.GENERATIONS}/{name}"
        if base not in self.needs.bases:
            yield self.item([path], files, "no cell that was forced is left")
        elif (layout.GENERATIONS, f"{base}.{number + 1}") in self.survey.folders:
            yield self.item([path], files, "was forced again since")

    def result(self, place: layout.Place, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield the garbage of a result, in use or set aside."""
        key, folder = place.key, "/".join(place.folder)
        if key not in self.needs.keys:
            self.learn_name(key)
            why = "no kept run or plan reaches it" if place.aside is None else _ASIDE
            yield self.item([f"{folder}/manifest.json", folder], files, why, key)
        elif place.aside is not None:
            yield from self.damaged(key, folder, files)
        else:
            yield from self.leftovers(key, files)

    def learn_name(self, key: str) -> None:
        """Take the cell's name from the manifest of a result that no run names."""
        if key not in self.needs.names:
            manifest = self.manifest(key)
            if isinstance(manifest, Manifest):
                self.needs.names[key] = manifest.cell

    def manifest(self, key: str) -> Manifest | StoreError | None:
        # Returns an error for a damaged manifest, or a link that leads out of the store.
        try:
            return self.survey.store.manifest(key)
        except StorageUnavailable:
            raise
        except StoreError as error:
            return error

    def damaged(self, key: str, folder: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield a result set aside; its attempts' records stay until there are later ones.

        So no attempt number is used twice.
        """
        numbers = _parts(files)
        later = _parts(self.survey.folders.get((layout.STAGES, key), ()))
        if max(numbers, default=0) < max(later, default=0):
            yield self.item([folder], files, "set aside as damaged, and computed again since", key)
            return
        for parts in numbers.values():
            for (path, _), found in parts.items():
                yield self.item([path], found, _ASIDE, key)

    def leftovers(self, key: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield the remains of attempts at a key that is needed."""
        numbers = _parts(files)
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
            for (path, part), found in parts.items():
                if served and number == manifest.attempt and part == layout.OUTPUTS:
                    why = "all downstream cells are complete (keep: results)"
                    yield replace(self.item([path], found, why, key), manifest=manifest)
                elif number != manifest.attempt or part == layout.CHECKPOINTS:
                    yield self.item([path], found, "the result is complete without it", key)

    def unfinished(
        self, key: str, numbers: Mapping[int, Mapping[Part, Sequence[StoredFile]]]
    ) -> Iterator[Garbage]:
        """Yield the outputs and checkpoints that the next attempt at a key will not use."""
        useful: dict[str, str] = {}  # checkpoint -> its newest copy
        for number in sorted(numbers):
            if any(part == layout.CHECKPOINTS for _, part in numbers[number]):
                whole = whole_checkpoints(self.survey.store.storage, key, number)
                useful |= {path.rpartition("/")[2]: path for path in whole}
        kept = {useful[name] for name in sorted(useful)[-_CHECKPOINTS:]}
        for parts in numbers.values():
            for (path, part), files in parts.items():
                if part == layout.OUTPUTS:
                    yield self.item([path], files, "its attempt has ended", key)
                    continue
                for entry, found in _entries(files).items():
                    if entry not in kept:
                        paths = [f"{entry}/{layout.DIGESTS}", entry]
                        yield self.item(paths, found, "there is a newer checkpoint", key)


def _parts(files: Iterable[StoredFile]) -> dict[int, dict[Part, list[StoredFile]]]:
    """Return attempt -> its outputs and checkpoints -> their files."""
    found: dict[int, dict[Part, list[StoredFile]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        place = layout.parse(file.path)
        if place is not None and place.attempt is not None:
            parts = found[place.attempt]  # also for an attempt without files
            if place.part in {layout.OUTPUTS, layout.CHECKPOINTS} and place.entry:
                parts[place.part_path, place.part].append(file)
    return found


def _entries(files: Iterable[StoredFile]) -> dict[str, list[StoredFile]]:
    """Return checkpoint -> its files."""
    found: dict[str, list[StoredFile]] = defaultdict(list)
    for file in files:
        if (place := layout.parse(file.path)) is not None:
            found[place.entry].append(file)
    return found
