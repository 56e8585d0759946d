"""Code that a user accepted as equivalent to earlier code.

The planner replaces accepted code in keys by the earlier code, so earlier results are found. The
document's name is a digest of stage type and code. Chains are followed: code accepted as code that
was accepted itself counts as the last one.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from pipeline.base.errors import DamagedDocument, StoreError
from pipeline.base.shapes import Time, to_json
from pipeline.code.provenance import this_user
from pipeline.spec.cells import shorten
from pipeline.store.checksum import with_checksum
from pipeline.store.layout import ACCEPTED
from pipeline.store.store import Store

Code = Mapping[str, str]  # module -> digest
_IN_KEYS = ("code", "who", "why", "time")  # the fields in ingredients


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """The document of accepted code.

    Attributes:
        stage: the stage type.
        code: module -> digest.
        as_: the code that replaces it in keys; `as` in the document.
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
    """The code that replaces accepted code in keys.

    Attributes:
        code: the code in the key.
        accepted: {code, who, why, time}: the accepted code, and who accepted it.
    """

    code: Code
    accepted: Mapping[str, Any]


class Acceptances:
    """The acceptances of a store, as of the first request."""

    def __init__(self, store: Store):
        self._store = store
        self._names: set[str] | None = None
        self._known: dict[str, Acceptance | None] = {}

    def find(self, stage: str, code: Code) -> Equivalence | None:
        """Return the code that replaces accepted code of a stage type; None if it is not accepted.

        Raises:
            StoreError: the acceptances form a circle.
        """
        names = [_identify(stage, code)]
        target, first = code, self._look_up(stage, names[0])
        document = first
        while document is not None:
            target = document.as_
            if (name := _identify(stage, target)) in names:
                circle = shorten(names[names.index(name) :])
                raise StoreError(
                    f"{self._store.url}/{ACCEPTED}: the acceptances of {stage} form a circle "
                    f"({circle}), so none of its code counts as the original. Delete the wrong "
                    "one of these files."
                )
            names.append(name)
            document = self._look_up(stage, name)
        if first is None:
            return None
        return Equivalence(target, {name: getattr(first, name) for name in _IN_KEYS})

    def root(self, stage: str, code: Code) -> Code:
        """Return the code that keys contain for `code`."""
        found = self.find(stage, code)
        return found.code if found else code

    def add(self, stage: str, code: Code, as_: Code, *, why: str, run: str) -> bool:
        """Record that code of a stage type counts as `as_`; tell whether that is new.

        `why` is the reason, and `run` the run that used `as_`.
        """
        code, as_ = self.root(stage, code), self.root(stage, as_)
        if code == as_:
            return False
        document = Acceptance(
            stage=stage,
            code=code,
            as_=as_,
            who=f"{this_user()}@{socket.gethostname()}",
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
    """Return a phrase with the person, day and reason of an acceptance."""
    day = datetime.fromtimestamp(accepted["time"])
    return f"accepted as equivalent by {accepted['who']} on {day:%Y-%m-%d}: {accepted['why']}"


def _identify(stage: str, code: Code) -> str:
    text = json.dumps([stage, code], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()}.json"
