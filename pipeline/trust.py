"""What this side names, so that a run in a store may use it.

Whoever can write to a store can name any module, address or folder in its documents. A document is
followed only as far as the pipeline file that is given here says the same, or the environment does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.places import DATABASE, LINES
from pipeline.spec import Spec, import_catalogue, read_values, tracking_folder_of
from pipeline.storage import LocalStorage
from pipeline.store import Store
from pipeline.tracking import RunFacts, TrackerName, absolute_uri, place, tracking_uri

BUILT_IN = "stages"  # the plugin that comes along


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
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return replace(run, uri=tracking_uri(None))
        known = {place(uri): uri for uri in self.addresses}
        uri = known.get(place(run.uri))
        return None if uri is None else replace(run, uri=absolute_uri(uri))


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a pipeline file names.

    Attributes:
        file: the file, whether or not it is there.
        plugins: plugins that may be imported.
        places: where runs may be recorded.
    """

    file: Path
    plugins: tuple[str, ...]
    places: Places

    def loaders(self) -> frozenset[str]:
        """Return the loaders of the plugins' catalogues, which are imported."""
        found = [
            plugin.catalogue.loader for plugin in map(import_catalogue, self.plugins) if plugin
        ]
        return frozenset(loader for loader in found if loader)

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
    """Return what a pipeline file names; one that is not there names what comes along.

    Nothing is imported; a file that is no pipeline is a `SpecError`.
    """
    plugins: tuple[str, ...] = (BUILT_IN,)
    uri, folder = tracking_uri(None), Path()
    if file.exists():
        shape = read_values(file)
        plugins += tuple(shape.plugins)
        folder = tracking_folder_of(shape.storage, file.parent)
        declared = shape.mlflow.tracking_uri
        uri = tracking_uri(declared, folder=file.parent, default_folder=folder)
    return Trust(file=file, plugins=plugins, places=_places(uri, folder, store))


def _places(uri: str, folder: Path, store: Store) -> Places:
    """Return a pipeline's own places, those beside a store, and that of jobs in it."""
    addresses, folders = [uri], [folder / LINES]
    if isinstance(store.storage, LocalStorage):
        root = store.storage.root
        addresses.append(f"sqlite:///{root.parent / DATABASE}")
        folders += [root.parent / LINES, root / LINES]
    return Places(addresses=tuple(addresses), folders=tuple(map(os.path.abspath, folders)))
