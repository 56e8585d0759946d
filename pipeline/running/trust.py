"""What this side names, so that a run in a store may use it.

A writer to the store can name any module, address or folder in its documents. A document is
followed only as far as the pipeline file that is given here says the same, or the environment does.
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

    def allowed(self, folder: str) -> str:
        """Return a folder of JSON lines, or where it is none of these, the present pipeline's."""
        return folder if os.path.abspath(folder) in self.folders else self.folders[0]

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
        plugins: its plugins, and the built-in one.
        trouble: why it names nothing, or "".
        everything: the user says that whatever the store names may be imported.
    """

    file: Path
    places: Places
    plugins: frozenset[str] = frozenset({BUILT_IN})
    trouble: str = ""
    everything: bool = False

    @property
    def option(self) -> str:
        """What gives a command this trust; it begins with a space, or is "" where all have it."""
        if self.everything:
            return " --trust"
        return "" if self.file == DEFAULT_FILE else f" --file {shlex.quote(str(self.file))}"

    def require_plugins(self, whose: str, plugins: Iterable[str]) -> None:
        """Check the plugins of a stored spec, before one of them is imported.

        Args:
            whose: the spec, as a sentence's subject: "the spec of run x ...".
            plugins: its plugins.

        Raises:
            BadInput: the file has not all of them.
        """
        strange = [name for name in plugins if name not in self.plugins]
        if strange and not self.everything:
            what = "plugin" if len(strange) == 1 else "plugins"
            raise BadInput(self._refusal(whose, f"{what} {shorten(strange)}"))

    def require_calls(self, whose: str, cells: Iterable[Cell]) -> None:
        """Check the functions that the parameters of a stored spec name.

        Names of a catalogue are its plugin's to explain, and are not looked at. The file's plugins
        are imported, where there is something to compare.

        Args:
            whose: as above.
            cells: the spec's.

        Raises:
            BadInput: the file has not all of them, called in the same way.
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
        """Return all that the file's parameters stand for; nothing, if it has mistakes."""
        try:
            return frozenset().union(*known_calls(load_spec(self.file).cells).values())
        except BadInput:
            return frozenset()

    def _refusal(self, whose: str, what: str) -> str:
        trouble = f" ({self.trouble})" if self.trouble else ""
        return (
            f"{whose} names {what} to be imported, and {self.file} does not{trouble}; nothing of "
            "it was. Give the run's own pipeline file to the command, or use it in that file's "
            "folder; or, if you know who can write to the store, and would run their code, give "
            "--trust."
        )

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


def read_trust(file: Path, store: Store, *, everything: bool = False) -> Trust:
    """Return what a pipeline file names; one that is not there, or is none, names nothing.

    Nothing is imported.

    Args:
        file: the file.
        store: the store whose documents are to be judged.
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
    """Return a pipeline's own places, those beside a store, and that of jobs in it."""
    addresses, folders = [uri], [folder / LINES]
    if isinstance(store.storage, LocalStorage):
        root = store.storage.root
        addresses.append(f"sqlite:///{root.parent / DATABASE}")
        folders += [root.parent / LINES, root / LINES]
    return Places(addresses=tuple(addresses), folders=tuple(map(os.path.abspath, folders)))
