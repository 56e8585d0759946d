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

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.base.errors import StorageUnavailable, StoreError
from pipeline.planning.planner import Plan
from pipeline.store.attempt import whole_checkpoints
from pipeline.store.layout import (
    CHECKPOINTS,
    DIGESTS,
    GENERATIONS,
    OUTPUTS,
    RUNS,
    STAGES,
    Place,
    parse,
    parse_generation,
    run_folder,
)
from pipeline.store.manifest import Manifest
from pipeline.store.storage.base import StoredFile
from pipeline.store.store import Store
from pipeline.upkeep.needs import Needs
from pipeline.upkeep.survey import Retention, Survey, newest

_ASIDE = "set aside as damaged"
_CHECKPOINTS = 2  # that a stage keeps, see `Context.checkpoint`
Part = tuple[str, str]  # of an attempt: its path, and its name


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
    """Finds what is not needed of a store."""

    def __init__(self, survey: Survey, needs: Needs):
        self.survey = survey
        self.needs = needs

    def garbage(self) -> Iterator[Garbage]:
        """Yield all that is not needed; runs first, so that none is left without its results."""
        for run_id, reason in self.needs.dropped.items():
            yield self.item([run_folder(run_id)], self.survey.folders[RUNS, run_id], reason)
        for path, files in self.survey.temporary.items():
            if self.survey.is_old(files):
                yield self.item([path], files, "left by a write or a deletion that was killed")
        for left in self.survey.store.storage.leftovers():
            place = parse(left.path)  # None of a folder on this machine
            files = self.survey.folders.get(place.folder, []) if place else []
            quiet = self.survey.is_old(files) and not (place and place.key in self.needs.busy)
            if quiet and self.survey.now - left.time >= self.survey.retention.grace_s:
                why = "left by a worker that was killed"
                found = self.item([left.path], [], why)
                yield replace(found, bytes=left.bytes, written=left.time, discard=left.discard)
        for (top, name), files in self.survey.folders.items():
            if not self.survey.is_old(files):
                continue
            place = parse(files[0].path)
            if place is None:
                continue
            if place.is_probe:
                yield self.item([top], files, "left by a start that was killed")
            elif top == GENERATIONS:
                yield from self.generation(name, files)
            elif place.key and place.key not in self.needs.busy:
                yield from self.result(place, files)

    def item(
        self, paths: Sequence[str], files: Sequence[StoredFile], reason: str, key: str = ""
    ) -> Garbage:
        """Return a thing to delete."""
        return Garbage(
            paths=tuple(paths),
            bytes=sum(file.bytes for file in files),
            written=newest(files),
            reason=reason,
            cell=self.needs.names.get(key, ""),
        )

    def generation(self, name: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield a generation that no cell has."""
        base, number = parse_generation(name) or ("", 0)
        path = f"{GENERATIONS}/{name}"
        if base not in self.needs.bases:
            yield self.item([path], files, "no cell that was forced is left")
        elif (GENERATIONS, f"{base}.{number + 1}") in self.survey.folders:
            yield self.item([path], files, "was forced again since")

    def result(self, place: Place, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield what is not needed of a result, in use or set aside."""
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
        """Look into the manifest of a result whose name no run tells."""
        if key not in self.needs.names:
            manifest = self.manifest(key)
            if isinstance(manifest, Manifest):
                self.needs.names[key] = manifest.cell

    def manifest(self, key: str) -> Manifest | StoreError | None:
        """Return the manifest of a result, None if there is none, or what is wrong with it.

        Raises:
            StorageUnavailable: that is not known.
        """
        try:
            return self.survey.store.manifest(key)
        except StorageUnavailable:
            raise
        except StoreError as error:  # damaged, or a link that leads out of the store
            return error

    def damaged(self, key: str, folder: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield a result set aside; the records of its attempts stay until later ones have come.

        Otherwise an attempt's number might be used twice.
        """
        numbers = _parts(files)
        later = _parts(self.survey.folders.get((STAGES, key), ()))
        if max(numbers, default=0) < max(later, default=0):
            yield self.item([folder], files, "set aside as damaged, and made again since", key)
            return
        for parts in numbers.values():
            for (path, _), found in parts.items():
                yield self.item([path], found, _ASIDE, key)

    def leftovers(self, key: str, files: Sequence[StoredFile]) -> Iterator[Garbage]:
        """Yield what attempts left at a key that is needed."""
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
                if served and number == manifest.attempt and part == OUTPUTS:
                    why = "all that was to be made of it is there (keep: results)"
                    yield replace(self.item([path], found, why, key), manifest=manifest)
                elif number != manifest.attempt or part == CHECKPOINTS:
                    yield self.item([path], found, "the result is complete without it", key)

    def unfinished(
        self, key: str, numbers: Mapping[int, Mapping[Part, Sequence[StoredFile]]]
    ) -> Iterator[Garbage]:
        """Yield what the next attempt at a key will not go on from."""
        useful: dict[str, str] = {}  # checkpoint -> its newest copy
        for number in sorted(numbers):
            if any(part == CHECKPOINTS for _, part in numbers[number]):
                whole = whole_checkpoints(self.survey.store.storage, key, number)
                useful |= {path.rpartition("/")[2]: path for path in whole}
        kept = {useful[name] for name in sorted(useful)[-_CHECKPOINTS:]}
        for parts in numbers.values():
            for (path, part), files in parts.items():
                if part == OUTPUTS:
                    yield self.item([path], files, "its attempt has ended", key)
                    continue
                for entry, found in _entries(files).items():
                    if entry not in kept:
                        paths = [f"{entry}/{DIGESTS}", entry]
                        yield self.item(paths, found, "a newer checkpoint is there", key)


def _parts(files: Iterable[StoredFile]) -> dict[int, dict[Part, list[StoredFile]]]:
    """Return attempt -> its outputs and checkpoints -> files there."""
    found: dict[int, dict[Part, list[StoredFile]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        place = parse(file.path)
        if place is not None and place.attempt is not None:
            parts = found[place.attempt]  # an attempt that has left nothing is one too
            if place.part in {OUTPUTS, CHECKPOINTS} and place.entry:
                parts[place.part_path, place.part].append(file)
    return found


def _entries(files: Iterable[StoredFile]) -> dict[str, list[StoredFile]]:
    """Return checkpoint -> its files."""
    found: dict[str, list[StoredFile]] = defaultdict(list)
    for file in files:
        if (place := parse(file.path)) is not None:
            found[place.entry].append(file)
    return found
