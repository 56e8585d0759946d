"""Code that counts as equivalent to earlier code, because someone said so and why.

The planner asks before it makes keys, so results that were made by that other code are found again,
and new ones join them. A document's name is made of stage type and code, so it is found without a
search. It is written once: accepted code that is accepted again, under yet other code, takes along
all that counts as the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from pipeline.base.errors import DamagedDocument, StoreError
from pipeline.base.shapes import Time, to_json
from pipeline.code.provenance import this_machine, this_user
from pipeline.spec.cells import shorten
from pipeline.store.checksum import with_checksum
from pipeline.store.layout import ACCEPTED
from pipeline.store.store import Store

Code = Mapping[str, str]  # module -> digest
_IN_KEYS = ("code", "who", "why", "time")  # the part of an acceptance that ingredients have


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """The document of accepted code.

    Attributes:
        stage: the stage type.
        code: module -> digest.
        as_: the code that it counts as; `as` in the document.
        who: the person who accepted it.
        why: the reason.
        time: Unix time.
        run: the run that used `as_`.
    """

    code: Code
    as_: Annotated[Code, Field(alias="as")]
    who: str
    why: str
    time: Time
    stage: str = ""
    run: str = ""


@dataclass(frozen=True)
class Equivalence:
    """What code counts as.

    Attributes:
        code: the code that stands in the key.
        accepted: {code, who, why, time}: the code that there is, and who said that it counts.
    """

    code: Code
    accepted: Mapping[str, Any]


class Acceptances:
    """What was accepted in a store, as it stands when it is first asked."""

    def __init__(self, store: Store):
        self._store = store
        self._names: set[str] | None = None
        self._known: dict[str, Acceptance | None] = {}

    def find(self, stage: str, code: Code) -> Equivalence | None:
        """Return what code of a stage type counts as, or None if it stands for itself.

        Raises:
            StoreError: what was accepted goes round in a circle.
        """
        names = [_identify(stage, code)]
        target, first = code, self._look_up(stage, names[0])
        document = first
        while document is not None:
            target = document.as_
            if (name := _identify(stage, target)) in names:
                circle = shorten(names[names.index(name) :])
                raise StoreError(
                    f"{self._store.url}/{ACCEPTED}: what was accepted of {stage} goes round in a "
                    f"circle ({circle}), so no code stands for the others. Delete the one of "
                    "these files that is wrong."
                )
            names.append(name)
            document = self._look_up(stage, name)
        if first is None:
            return None
        return Equivalence(target, {name: getattr(first, name) for name in _IN_KEYS})

    def root(self, stage: str, code: Code) -> Code:
        """Return the code that stands in the keys for `code`."""
        found = self.find(stage, code)
        return found.code if found else code

    def add(self, stage: str, code: Code, as_: Code, *, why: str, run: str) -> bool:
        """Record that code of a stage type counts as other code; tell whether that was news.

        Args:
            stage: the stage type.
            code: the code.
            as_: what it counts as.
            why: the reason.
            run: the run that used `as_`.
        """
        code, as_ = self.root(stage, code), self.root(stage, as_)
        if code == as_:
            return False
        document = Acceptance(
            stage=stage,
            code=code,
            as_=as_,
            who=f"{this_user()}@{this_machine()}",
            why=why,
            time=time.time(),
            run=run,
        )
        self._store.prepare()
        path = f"{ACCEPTED}/{_identify(stage, code)}"
        added = self._store.storage.create(path, with_checksum(to_json(document)))
        self._names, self._known = None, {}
        return added

    def _look_up(self, stage: str, name: str) -> Acceptance | None:
        if name not in self._known:
            self._known[name] = self._read(stage, name)
        return self._known[name]

    def _read(self, stage: str, name: str) -> Acceptance | None:
        if self._names is None:
            self._names = set(self._store.storage.names(ACCEPTED))
        if name not in self._names:
            return None
        try:
            return self._store.read_document(Acceptance, f"{ACCEPTED}/{name}")
        except DamagedDocument as error:
            raise DamagedDocument(
                f"{error} Delete it, and accept the code of {stage} again."
            ) from error


def describe(accepted: Mapping[str, Any]) -> str:
    """Say who accepted code, when and why."""
    day = datetime.fromtimestamp(accepted["time"])
    return f"accepted as equivalent by {accepted['who']} on {day:%Y-%m-%d}: {accepted['why']}"


def _identify(stage: str, code: Code) -> str:
    text = json.dumps([stage, code], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()}.json"
