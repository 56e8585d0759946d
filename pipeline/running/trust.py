"""The trust in stored documents: code, addresses and folders that the pipeline file names.

A writer to the store can name any module, address or folder in its documents. The runner uses one
only if the present pipeline file, or the environment, names it too.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.base.errors import BadInput, SpecError
from pipeline.base.places import DATABASE, LINES, absolute_uri, tracking_folder_of, tracking_uri
from pipeline.base.variables import TRACKING_URI
from pipeline.planning.keys import known_calls, own_calls
from pipeline.running.record import DEFAULT_FILE
from pipeline.spec.cells import Cell, Registration, shorten
from pipeline.spec.load import load_spec, read_values
from pipeline.spec.spec import Spec
from pipeline.store.storage.local import LocalStorage
from pipeline.store.store import Store
from pipeline.tracking import RunFacts, TrackerName, place

BUILT_IN = "stages"  # the plugin of this project


@dataclass(frozen=True, kw_only=True)
class Places:
    """The places where runs may be recorded.

    Attributes:
        addresses: of MLflow servers and databases.
        folders: of JSON lines.
    """

    addresses: tuple[str, ...]
    folders: tuple[str, ...]

    def allowed(self, folder: str) -> str:
        """Return a folder of JSON lines if it is one of these, else the present pipeline's."""
        return folder if os.path.abspath(folder) in self.folders else self.folders[0]

    def find(self, run: RunFacts, tracker: TrackerName) -> RunFacts | None:
        """Return a run's facts with its place as named here; None if it is not named here."""
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
    """The code and places that a pipeline file names.

    Attributes:
        file: the file, which may be missing.
        places: the places where runs may be recorded.
        plugins: its plugins, and the built-in one.
        trouble: why it names nothing, or "".
        everything: whether the user allows the import of any code that the store names.
    """

    file: Path
    places: Places
    plugins: frozenset[str] = frozenset({BUILT_IN})
    trouble: str = ""
    everything: bool = False

    @property
    def option(self) -> str:
        """The option that gives a command this trust, with a leading space; "" for the default."""
        if self.everything:
            return " --trust"
        return "" if self.file == DEFAULT_FILE else f" --file {shlex.quote(str(self.file))}"

    def require_plugins(self, whose: str, plugins: Iterable[str]) -> None:
        """Check the plugins of a stored spec before it imports them.

        Args:
            whose: the spec, as a sentence's subject: "the spec of run x ...".
            plugins: its plugins.

        Raises:
            BadInput: the file lacks one of them.
        """
        strange = [name for name in plugins if name not in self.plugins]
        if strange and not self.everything:
            what = "plugin" if len(strange) == 1 else "plugins"
            raise BadInput(self._refusal(whose, f"{what} {shorten(strange)}"))

    def require_calls(self, whose: str, cells: Iterable[Cell]) -> None:
        """Check the functions that the parameters of a stored spec name.

        Names of a catalogue belong to its plugin, and are not checked. If there are other names,
        this imports the file's plugins.

        Args:
            whose: the spec, as for `require_plugins`.
            cells: the spec's cells.

        Raises:
            BadInput: the file lacks one of them, with the same options.
        """
        named = [one for cell in cells for one in own_calls(cell)]
        if not named or self.everything:
            return
        known = self._calls()
        strange = dict.fromkeys(name for name, calls in named if not known.issuperset(calls))
        if strange:
            what = f"{shorten(list(strange))}, with the options that it gives,"
            raise BadInput(self._refusal(whose, what))

    def _calls(self) -> frozenset[str]:
        """Return all calls that the file's parameters mean; none if it has mistakes."""
        try:
            return frozenset().union(*known_calls(load_spec(self.file).cells).values())
        except BadInput:
            return frozenset()

    def _refusal(self, whose: str, what: str) -> str:
        trouble = f" ({self.trouble})" if self.trouble else ""
        return (
            f"{whose} names {what} to be imported, and {self.file} does not{trouble}; nothing was "
            "imported. Give the run's own pipeline file to the command, or use the command in that "
            "file's folder; or, if you know who can write to the store, and would run their code, "
            "give --trust."
        )

    def registrations(self) -> Mapping[str, tuple[Registration, Sequence[str]]]:
        """Return cell -> the registration of its model, and the calls that may load it.

        This imports the file's plugins; a file that is no pipeline raises `SpecError`.
        """
        cells = load_spec(self.file).cells
        calls = known_calls(cells)
        return {
            cell.name: (cell.registration, sorted(calls[cell.name]))
            for cell in cells
            if cell.registration is not None
        }

    def stranger(self, run: RunFacts, tracker: TrackerName) -> str:
        """Return why a run is not recorded at its document's place, with a remedy, as predicate."""
        if tracker is TrackerName.JSONL:
            return (
                f"is recorded in {run.folder}, which the store names and {self.file} does not; "
                "give the run's own pipeline as --file."
            )
        return (
            f"is recorded at {place(run.uri)}, which the store names and {self.file} does not; if "
            "that is right, set MLFLOW_TRACKING_URI to it."
        )


def places_of(spec: Spec, store: Store) -> Places:
    """Return the places where runs of a spec may be recorded."""
    return _places(spec.tracking_uri(), spec.tracking_folder, store)


def read_trust(file: Path, store: Store, *, everything: bool = False) -> Trust:
    """Return the trust of a pipeline file, without any import; a missing or invalid one has none.

    Args:
        file: the file.
        store: the store whose documents it judges.
        everything: see `Trust`.
    """
    uri, folder, plugins, trouble = tracking_uri(None), Path(), {BUILT_IN}, ""
    try:
        shape = read_values(file)
    except SpecError:
        trouble = "which has mistakes, see `fls validate`"
    except BadInput:
        trouble = "which cannot be read"
    else:
        folder = tracking_folder_of(shape.storage, file.parent)
        declared = shape.mlflow.tracking_uri
        uri = tracking_uri(declared, folder=file.parent, default_folder=folder)
        plugins.update(shape.plugins)
    return Trust(
        file=file,
        places=_places(uri, folder, store),
        plugins=frozenset(plugins),
        trouble=trouble,
        everything=everything,
    )


def _places(uri: str, folder: Path, store: Store) -> Places:
    """Return a pipeline's own places, those beside a store, and that of jobs in the store."""
    addresses, folders = [uri], [folder / LINES]
    if isinstance(store.storage, LocalStorage):
        root = store.storage.root
        addresses.append(f"sqlite:///{root.parent / DATABASE}")
        folders += [root.parent / LINES, root / LINES]
    return Places(addresses=tuple(addresses), folders=tuple(map(os.path.abspath, folders)))
