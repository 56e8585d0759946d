"""Secrets: kept out of specs, and out of all that is shown or recorded.

A spec, its parameters, the events of its stages and what fails are written into the store and the
tracking server, where many can read them. So a spec may not take a value from a variable whose name
says that it is a secret, nor hold the value of one; and texts that are made elsewhere (a stage that
prints its environment, a library that puts a URL into its error) are redacted on their way. What a
variable holds is judged here alone, for specs as for the jobs that are given variables.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from pipeline.base.text import printable

_NAME = re.compile(
    r"PASSW(OR)?D|PASSPHRASE|SECRET|CREDENTIAL|APIKEY|TOKENS?(_|$)|COOKIES?(_|$)"
    r"|CONNECTION_?STRING|AUTHORIZATION"
    r"|(^|_)((ACCESS|PRIVATE)?KEYS?|PASS)(_|$)|._PWD$",
    re.IGNORECASE,
)
_PLACE = re.compile(
    r"_(FILE|FILENAME|PATH|DIR)$", re.IGNORECASE
)  # where a secret lies is none itself
# Each of these is linear in the text; one pattern for a whole URL would not be.
_WORD = re.compile(r"[^\s'\"<>]+")
_AFTER_AUTHORITY = re.compile(r"[/?#]")
_OPTION = re.compile(r"[?&;]([^=?&;#]*)=([^&;#]+)")
_OPTION_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|SIGNATURE|CREDENTIAL|APIKEY|\bSIG\b|(^|[_-])KEY", re.IGNORECASE
)
# What names a secret inside of a value, besides what does so as a variable's name.
_INNER_NAME = re.compile(r"(^|_)(AUTH|PWD|SAS|JWT)$|SIGNATURE|ODBC_CONNECT", re.IGNORECASE)
_NEW_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
# Of a connection string; a name alone is no URL, and `key` alone none of a secret.
_SETTING = re.compile(r"(?:^|[;,])(?!\s*keys?\s*=)([^=;,:/?&]*)=([^;,]*)", re.IGNORECASE)
_QUOTED_PAIR = re.compile(r"""["']([^"']+)["']\s*:\s*["']([^"']+)["']""")
_LONE_TOKEN = 20  # a user without a password that is so long is a token, unless it is words
_CONTAINER = ("abfs", "abfss", "wasb", "wasbs")  # where a user would stand, these have a container
_SHORTEST = 8  # a shorter value would be found in text that has nothing to do with it
_GUESSABLE = 12  # and so would a password of words that is shorter than this
_WORDS = re.compile(r"[A-Z]?[a-z]*[0-9]{0,8}([-_.][A-Z]?[a-z]*[0-9]{0,8})*")
HIDDEN = "***"
HIDDEN_IN_NAME = "hidden"  # tracking servers take no asterisks in the name of a metric


def is_secret(name: str) -> bool:
    """Tell whether an environment variable's name says that its value is a secret.

    >>> is_secret("HF_TOKEN"), is_secret("AWS_SECRET_ACCESS_KEY"), is_secret("PGPASSWORD")
    (True, True, True)
    >>> is_secret("TOKENIZERS_PARALLELISM"), is_secret("PWD"), is_secret("KEYBOARD")
    (False, False, False)
    >>> is_secret("AWS_SHARED_CREDENTIALS_FILE")
    False
    """
    return _NAME.search(name) is not None and not _PLACE.search(name)


def has_credentials(text: str) -> bool:
    """Tell whether a text holds a URL with a password, a token or a signature.

    >>> has_credentials("s3://key:secret@bucket"), has_credentials("sftp://me@host/a?b=c")
    (True, False)
    >>> has_credentials("https://ghp_16C7e42F292c6912E7710c83@host")
    True
    >>> has_credentials("sftp://pruning-results-2026-prod@host")
    False
    """
    return next(_credentials(text), None) is not None


def holds_secret(value: str) -> bool:
    """Tell whether a variable's value, whatever its name, has a secret in it.

    >>> holds_secret("s3://key:secret@bucket"), holds_secret('{"client_kwargs": {"token": "t"}}')
    (True, True)
    >>> holds_secret("AccountName=a;AccountKey=k"), holds_secret('{"anon": true, "key": null}')
    (True, False)
    """
    return has_credentials(value) or bool(_named_secrets(value))


def is_secret_variable(name: str, value: str) -> bool:
    """Tell whether a variable is a secret, by its name or by what is in its value."""
    return is_secret(name) or holds_secret(value)


def find_secret(text: str, environment: Mapping[str, str]) -> tuple[int, str] | None:
    """Return where a text holds a secret, and what kind of one; None if it does not.

    Args:
        text: such as a spec.
        environment: variables, whose secret values are looked for.
    """
    for start, _ in _credentials(text):
        return start, "a URL with credentials"
    for name, value in secret_values(environment):
        if value in text:
            return text.index(value), f"the value of the environment variable {name}"
    return None


def secret_values(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of the secrets in an environment that can be told from other text.

    Of a URL with credentials, JSON or a connection string these are the whole, and each of the
    secrets in it; but not a password such as `postgres`, a short one that is made of words, which
    any text may hold by chance. It is hidden where it stands in the whole. What a variable's name
    declares a secret is one, however weak.

    >>> list(secret_values({"A_TOKEN": "long enough", "B_TOKEN": "short", "HOME": "/home/me"}))
    [('A_TOKEN', 'long enough')]
    >>> dict(secret_values({"DB": "postgresql://me:postgres@host"}))
    {'DB': 'postgresql://me:postgres@host'}
    """
    for name, value in environment.items():
        found = [value[start:end].rpartition(":")[2] for start, end in _credentials(value)]
        found += _named_secrets(value)
        whole = [value] if found or is_secret(name) else []
        parts = [one for one in found if len(one) >= _GUESSABLE or not _WORDS.fullmatch(one)]
        for one in dict.fromkeys([*whole, *parts, *map(unquote, parts)]):
            if len(one) >= _SHORTEST:
                yield name, one


def _named_secrets(value: str) -> list[str]:
    """Return what is named a secret in a value that is JSON, or looks like it, or has settings."""
    if not value.lstrip().startswith(("{", "[")):
        pairs = _SETTING.findall(value)
    else:
        try:
            return list(_secrets_of(json.loads(value), named=False))
        except (ValueError, RecursionError):
            pairs = _QUOTED_PAIR.findall(value)
    return [one.strip() for name, one in pairs if _names_secret(name.strip()) and one.strip()]


def _secrets_of(data: Any, named: bool) -> Iterator[str]:
    """Yield the texts and numbers in JSON data that a key declares to be secret."""
    if isinstance(data, dict):
        for key, one in data.items():
            yield from _secrets_of(one, named or _names_secret(key))
    elif isinstance(data, list):
        for one in data:
            yield from _secrets_of(one, named)
    elif isinstance(data, str):
        if named and data:
            yield data
        elif not named:
            yield from _named_secrets(data)
    elif named and data is not None and not isinstance(data, bool):
        yield str(data)


def _names_secret(name: str) -> bool:
    """Tell whether the name of something in a value says that it is secret: AccountKey, auth."""
    words = _NEW_WORD.sub("_", name)
    return is_secret(words) or (_INNER_NAME.search(words) is not None and not _PLACE.search(words))


def _credentials(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the secret parts of the URLs in a text begin and end."""
    if "://" not in text:
        return
    for word in _WORD.finditer(text):
        scheme, *urls = word[0].split("://")
        begin = word.start() + len(scheme)
        for url in urls:
            begin += len("://")
            user = _AFTER_AUTHORITY.split(url, maxsplit=1)[0].rpartition("@")[0]
            name = scheme.endswith(_CONTAINER) or _WORDS.fullmatch(user)
            if ":" in user or (len(user) >= _LONE_TOKEN and not name):
                yield begin, begin + len(user)
            for option in _OPTION.finditer(url):
                asked = unquote(option[1])
                if _OPTION_NAME.search(asked) or _names_secret(asked):
                    yield begin + option.start(2), begin + option.end(2)
            begin += len(url)
            scheme = url


def redact(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Return JSON-able data with the secrets in its texts replaced by `***`, in names by `hidden`.

    Args:
        value: a text, or mappings and lists of texts and other values.
        environment: whose secrets are looked for; None for this process's.
    """
    if environment is None:
        return _redactor_here().data(value)
    return _redactor(frozenset(environment.items())).data(value)


def presentable(text: str) -> str:
    """Return a text as it may be shown: without secrets and without terminal controls."""
    return printable(redact(text))


@functools.lru_cache(maxsize=4)
def _redactor(environment: frozenset[tuple[str, str]]) -> _Redactor:
    return _Redactor(dict(environment))


_here: tuple[Mapping[Any, Any], _Redactor] | None = None


def _redactor_here() -> _Redactor:
    """Return the redactor of this process's environment, made again whenever that has changed.

    The variables as `os.environ` holds them are compared: decoding all of them, for each line that
    a stage prints, would take ten times as long as the redaction.
    """
    global _here
    held: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
    if _here is None or _here[0] != held:
        _here = dict(held), _Redactor(dict(os.environ))
    return _here[1]


def _forms(value: str) -> set[str]:
    """Return the texts by which a secret may be found: itself, escaped, and its lines."""
    escaped = {repr(value)[1:-1], json.dumps(value)[1:-1], quote(value), quote(value, safe="")}
    lines = {line for line in value.splitlines() if len(line) >= 2 * _SHORTEST}
    return {value, *escaped, *lines}


class _Redactor:
    def __init__(self, environment: Mapping[str, str]):
        known = {
            form
            for name, value in secret_values(environment)
            # of a URL, just what is secret in it
            if is_secret(name) or _named_secrets(value) or not has_credentials(value)
            for form in _forms(value)
        }
        longest_first = sorted((one for one in known if len(one) >= _SHORTEST), key=len)[::-1]
        self.values = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def data(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.name(key): self.data(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(one) for one in value]
        return value

    def name(self, name: Any) -> Any:
        shown = self.text(name) if isinstance(name, str) else name
        return name if shown == name else shown.replace(HIDDEN, HIDDEN_IN_NAME)

    def text(self, text: str) -> str:
        text = self.values.sub(HIDDEN, text)
        parts, done = [], 0
        for start, end in _credentials(text):
            parts += [text[done:start], HIDDEN]
            done = end
        return "".join([*parts, text[done:]])
