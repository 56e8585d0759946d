"""What this side names, so that a run in a store may use it.

Whoever can write to a store can name any module, address or folder in its documents. A document is
followed only as far as the pipeline file that is given here says the same, or the environment does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import BadInput
from pipeline.graph import Registration
from pipeline.keys import known_calls
from pipeline.places import DATABASE, LINES
from pipeline.spec import Spec, load_spec, read_values, tracking_folder_of
from pipeline.storage import LocalStorage
from pipeline.store import Store
from pipeline.tracking import RunFacts, TrackerName, absolute_uri, place, tracking_uri
from pipeline.variables import TRACKING_URI


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where runs may be recorded.

    Attributes:
        addresses: of MLflow servers and databases.
        folders: of JSON lines.
    """

    addresses: tuple[str, ...]
    folders: tuple[str, ...]

    def find(self, run: RunFacts, tracker: TrackerName) -> RunFacts | None:
        """Return where a run is recorded, in the words of this side; None if it has none for it."""
        if tracker is TrackerName.JSONL:
            folder = os.path.abspath(run.folder)
            return replace(run, folder=folder) if folder in self.folders else None
        if TRACKING_URI.read():
            return replace(run, uri=tracking_uri(None))
        known = {place(uri): uri for uri in self.addresses}
        uri = known.get(place(run.uri))
        return None if uri is None else replace(run, uri=absolute_uri(uri))


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a pipeline file names.

    Attributes:
        file: the file, whether or not it is there.
        places: where runs may be recorded.
    """

    file: Path
    places: Places

    def registrations(self) -> Mapping[str, tuple[Registration, Sequence[str]]]:
        """Return cell -> how its model is registered, and what may be called to load it.

        The file's plugins are imported; a file that is no pipeline is a `SpecError`.
        """
        cells = load_spec(self.file).cells
        calls = known_calls(cells)
        return {
            cell.name: (cell.registration, sorted(calls[cell.name]))
            for cell in cells
            if cell.registration is not None
        }

    def stranger(self, run: RunFacts, tracker: TrackerName) -> str:
        """Say why a run is not recorded where its document says, and what to do."""
        if tracker is TrackerName.JSONL:
            return (
                f"is recorded in {run.folder}, as the store says and {self.file} does not; give "
                "the run's own pipeline as --file."
            )
        return (
            f"is recorded at {place(run.uri)}, as the store says and {self.file} does not; if that "
            "is right, set MLFLOW_TRACKING_URI to it."
        )


def places_of(spec: Spec, store: Store) -> Places:
    """Return where runs of a spec may be recorded."""
    return _places(spec.tracking_uri(), spec.tracking_folder, store)


def read_trust(file: Path, store: Store) -> Trust:
    """Return what a pipeline file names; one that is not there, or is none, names nothing.

    Nothing is imported.
    """
    uri, folder = tracking_uri(None), Path()
    with suppress(BadInput):
        shape = read_values(file)
        folder = tracking_folder_of(shape.storage, file.parent)
        declared = shape.mlflow.tracking_uri
        uri = tracking_uri(declared, folder=file.parent, default_folder=folder)
    return Trust(file=file, places=_places(uri, folder, store))


def _places(uri: str, folder: Path, store: Store) -> Places:
    """Return a pipeline's own places, those beside a store, and that of jobs in it."""
    addresses, folders = [uri], [folder / LINES]
    if isinstance(store.storage, LocalStorage):
        root = store.storage.root
        addresses.append(f"sqlite:///{root.parent / DATABASE}")
        folders += [root.parent / LINES, root / LINES]
    return Places(addresses=tuple(addresses), folders=tuple(map(os.path.abspath, folders)))
