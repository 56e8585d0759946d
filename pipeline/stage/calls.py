"""The functions that stored files may have a stage import and call."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.stage.errors import StageError


def call_text(
    target: str, argument: str | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """Return a call that a registry name means, as one text to compare.

    Args:
        target: `module:attribute`.
        argument: the rest of a name after its family's prefix, or None.
        options: keyword arguments of the call, where they matter; JSON.
    """
    return json.dumps([target, argument, options], sort_keys=True)


_known_calls: frozenset[str] | None = None  # of the process, so that it binds all threads


@contextmanager
def only_calls(calls: Iterable[str]) -> Iterator[None]:
    """Let `require_call` accept only these calls (see `call_text`) inside the context."""
    global _known_calls
    before, _known_calls = _known_calls, frozenset(calls)
    try:
        yield
    finally:
        _known_calls = before


def require_call(
    target: str, argument: str | None = None, options: Mapping[str, Any] | None = None
) -> None:
    """Check a call that a stored file names, before the stage imports it; see `call_text`.

    Files of a store name the functions that build a network or read its data. The runner knows the
    calls that the parameters of the cell and of all cells upstream mean; any other may come from a
    tampered store. Outside the runner nothing is checked.

    Raises:
        StageError: no parameter of the cell or of a cell upstream means this call.
    """
    known = _known_calls
    if known is None or call_text(target, argument, options) in known:
        return
    named = f"{target!r} to be imported"
    if argument is not None:
        named += f" and called with {argument!r}"
    if options:
        named += f" and given {json.dumps(options, sort_keys=True)[:200]}"
    raise StageError(
        f"a stored file names {named}, which no parameter of this cell or upstream means; the "
        "store may have been tampered with."
    )
