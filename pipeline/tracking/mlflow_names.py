"""Makes a stage's names, texts, numbers and paths of artifacts acceptable to MLflow.

Names are data: a stage may call a metric `acc@1`, a parameter `layers[0]`, a file `50%25.txt`.
MLflow's alphabet and lengths are narrower, its databases compare names differently, and one refused
entry costs the whole batch. So each entry that does not fit is changed before it is sent, and a tag
keeps the original: `fls.name.NAME` holds the name that became NAME, `fls.value.NAME` the value that
NAME does not hold whole.

A name changes in the same way in each run, so that runs can be compared by it; the digest at its
end keeps any two names apart. A name that fits stays, unless an earlier name of the run differs
from it only in case, accents or trailing spaces, which some databases ignore.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.base.text import CONTROLS
from pipeline.tracking.series import Point

PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
RUN_NAME_CHARACTERS = 250
NAME_TAG = "fls.name."
VALUE_TAG = "fls.value."

_NAME_CHARACTERS = 250
_RENAMED_CHARACTERS = _NAME_CHARACTERS - max(len(NAME_TAG), len(VALUE_TAG))
_ODD = re.compile(r"[^/\w.\- :]")
_UNSENDABLE = re.compile("[\0\ud800-\udfff]")  # in no database, or no encoding
# A URL's path ends at # or ?, and % may begin an escape.
_ODD_IN_PATH = re.compile(r"[#?]|%(?=[0-9A-Fa-f]{2})")
_DIGEST = 6
_STEPS = 2**63
_RULE = "letters, digits and any of _-./: and spaces, no path such as a//b, at most 250 characters"
_NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of an entry before it is sent.

    Attributes:
        tag: the tag that keeps the original.
        original: the original name or value.
        message: for people.
    """

    tag: str
    original: str
    message: str


class Fitting:
    """Makes the entries of one MLflow run fit, and keeps their names apart.

    Args:
        metrics: names of the run's metrics.
        tags: the run's tags, which have the original names.
    """

    def __init__(self, metrics: Iterable[str] = (), tags: Mapping[str, str] = _NOTHING):
        self._kept = {tag for tag in tags if tag.startswith((NAME_TAG, VALUE_TAG))}
        self._metrics = _Names({name: tags.get(NAME_TAG + name, name) for name in metrics})
        self._tags = _Names({})
        self._changes: list[Change] = []

    def points(self, points: Iterable[Point]) -> list[Point]:
        """Return points of metrics that fit."""
        return [self._point(point) for point in points]

    def params(self, params: Mapping[str, Any], sent: Iterable[str] = ()) -> dict[str, str]:
        """Return nested parameters by dotted names, without those `sent` before."""
        names, done = _Names({}), set(sent)
        found = {}
        for original, value in _flatten(params):
            name = names.find(original)
            if name not in done:
                self._keep_name("parameter", original, name, names)
                found[name] = self._text("parameter", name, str(value), PARAM_CHARACTERS)
        return found

    def tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Return tags that fit."""
        found = {}
        for original, value in tags.items():
            name = self._tags.find(original)
            self._keep_name("tag", original, name, self._tags)
            found[name] = self._text("tag", name, value, TAG_CHARACTERS)
        return found

    def keep_path(self, original: str, path: str) -> None:
        """Note the original path of an artifact, if it differs."""
        if path != original:
            name = fit_name(path, _NAME_CHARACTERS - len(NAME_TAG))
            reason = f"MLflow cannot keep a file called {original!r}"
            self._keep_as("artifact", original, name, f"{reason} by that name")

    def take_changes(self) -> list[Change]:
        """Return the changes since the last call that no tag of the run keeps yet."""
        taken, self._changes = self._changes, []
        return taken

    def _point(self, point: Point) -> Point:
        name = self._metrics.find(point.name)
        self._keep_name("metric", point.name, name, self._metrics)
        value, step = point.value, point.step
        if math.isinf(value):
            value = math.copysign(sys.float_info.max, value)
            self._keep_value(
                name,
                f"{point.value} at step {step}",
                f"MLflow has no infinite numbers: the metric {point.name!r} is recorded as "
                f"{value:.4g}",
            )
        if not -_STEPS <= step < _STEPS:
            step = max(-_STEPS, min(step, _STEPS - 1))
            message = f"MLflow has no step as large as {point.step} (metric {point.name!r})"
            self._keep_value(name, f"{point.value} at step {point.step}", message)
        return Point(name, value, point.time_s, step)

    def _keep_name(self, kind: str, original: str, name: str, names: _Names) -> None:
        if name == original:
            return
        if fits(original):
            reason = (
                f"Some databases cannot tell the {kind} {original!r} from {names.like(original)!r}"
            )
        else:
            reason = f"MLflow takes no {kind} called {_shown(original)} (it takes {_RULE})"
        self._keep_as(kind, original, name, reason)

    def _keep_as(self, kind: str, original: str, name: str, reason: str) -> None:
        tag = NAME_TAG + name
        self._keep(
            tag,
            original,
            f"{reason}: it is recorded as {name!r}, and the tag {tag} keeps its name.",
        )

    def _keep_value(self, name: str, original: str, reason: str) -> None:
        tag = VALUE_TAG + fit_name(name, _NAME_CHARACTERS - len(VALUE_TAG))
        self._keep(tag, original, f"{reason}; the tag {tag} keeps the original.")

    def _keep(self, tag: str, original: str, message: str) -> None:
        if tag not in self._kept:
            self._kept.add(tag)
            self._changes.append(Change(tag=tag, original=original, message=message))

    def _text(self, kind: str, name: str, text: str, longest: int) -> str:
        fit = fit_text(text)
        if fit != text:
            reason = f"MLflow takes no text with the characters of the {kind} {name!r}"
            self._keep_value(name, json.dumps(text), reason)
        if len(fit) > longest:
            reason = f"MLflow keeps {longest:,} of the {len(text):,} characters of {kind} {name!r}"
            self._keep_value(name, fit, reason)
        return fit[:longest]


class _Names:
    """The names of one kind in one run, kept apart.

    Args:
        known: name in MLflow -> original name.
    """

    def __init__(self, known: Mapping[str, str]):
        self._found = {original: name for name, original in known.items()}
        self._taken = {_fold(name): original for name, original in known.items()}

    def find(self, original: str) -> str:
        """Return a name's form in MLflow."""
        if original not in self._found:
            free = self._taken.get(_fold(original), original) == original
            name = original if fits(original) and free else _rename(original, _RENAMED_CHARACTERS)
            self._found[original] = name
            self._taken[_fold(name)] = original
        return self._found[original]

    def like(self, original: str) -> str:
        """Return the earlier name that some databases treat as equal."""
        return self._taken[_fold(original)]


def fits(name: str) -> bool:
    """Tell whether MLflow accepts a name of a metric, a parameter or a tag.

    >>> fits("train/loss"), fits("acc@1"), fits("a/../b"), fits("")
    (True, False, False, False)
    """
    plain = bool(name) and len(name) <= _NAME_CHARACTERS and not _ODD.search(name)
    leads_on = name == "." or name.startswith(("/", "..")) or posixpath.normpath(name) != name
    return plain and not leads_on


def fit_name(name: str, longest: int = _NAME_CHARACTERS) -> str:
    """Return a name that MLflow accepts: the same one, or else one unique to this name.

    >>> fit_name("train/loss"), fit_name("acc@1")
    ('train/loss', 'acc_1-71dfc1')
    """
    return name if fits(name) and len(name) <= longest else _rename(name, longest)


def fit_label(text: str, longest: int) -> str:
    """Return a text of bounded length; a cut text ends with its digest, so it stays unique.

    >>> fit_label("oneshot[seed=0]", 250), fit_label("long" * 5, 16)
    ('oneshot[seed=0]', 'longlongl-53d8fc')
    """
    fit = fit_text(text)
    return fit if len(fit) <= longest else f"{fit[: longest - _DIGEST - 1]}-{_digest(text)}"


def fit_text(text: str) -> str:
    r"""Return a text that can be sent and stored: lone surrogates and NUL become escapes.

    >>> fit_text("a\ud800b\0")
    'a\\ud800b\\x00'
    """
    return _UNSENDABLE.sub(lambda match: repr(match[0])[1:-1], text)


def fit_path(path: str) -> str:
    """Return the artifact path for a file's path relative to its output's folder.

    >>> fit_path("rows.json"), fit_path("a#1/b?.txt")
    ('rows.json', 'a_1/b_-0baf3f.txt')
    """
    plain = CONTROLS.sub("_", _ODD_IN_PATH.sub("_", path))
    if plain == path:
        return path
    name = PurePosixPath(plain)
    return str(name.with_name(f"{name.stem}-{_digest(path)}{name.suffix}"))


def _rename(name: str, longest: int) -> str:
    parts = [part for part in _ODD.sub("_", name).split("/") if part not in {"", ".", ".."}]
    stem = "/".join(parts).lstrip(".") or "unnamed"
    return f"{stem[: longest - _DIGEST - 1]}-{_digest(name)}"


def _digest(name: str) -> str:
    data = name.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()[:_DIGEST]


def _fold(name: str) -> str:
    """Return the same text for names that some database treats as equal."""
    letters = unicodedata.normalize("NFKD", name)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return plain.casefold().rstrip()


def _flatten(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested parameters; of two equal names the second is quoted."""
    seen: set[str] = set()
    for path, value in _leaves(params, ()):
        name = ".".join(path)
        if name in seen:
            name = ".".join(map(json.dumps, path))
        seen.add(name)
        yield name, value


def _leaves(params: Mapping[str, Any], path: Sequence[str]) -> Iterator[tuple[Sequence[str], Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def _shown(name: str) -> str:
    return ascii(name) if len(name) <= 100 else f"{ascii(name[:100])}..."
