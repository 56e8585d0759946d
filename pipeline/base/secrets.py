"""Detection and redaction of secrets in specs, logs, documents and output.

Specs, parameters, events and errors go to the store and the tracking server, which many can read.
So a spec may neither take a value from a secret variable nor contain one, and other texts (a stage
prints its environment, a library's error contains a URL) are redacted. A secret variable has a
telling name, such as HF_TOKEN, or a telling value, such as a URL with a password.
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
_PLACE = re.compile(r"_(FILE|FILENAME|PATH|DIR)$", re.IGNORECASE)  # the path of a secret is none
# Each of these is linear in the text; one pattern for a whole URL would not be.
_WORD = re.compile(r"[^\s'\"<>]+")
_AFTER_AUTHORITY = re.compile(r"[/?#]")
_OPTION = re.compile(r"[?&;]([^=?&;#]*)=([^&;#]+)")
_OPTION_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|SIGNATURE|CREDENTIAL|APIKEY|\bSIG\b|(^|[_-])KEY", re.IGNORECASE
)
# Names of secrets inside a value, beside those of secret variables.
_INNER_NAME = re.compile(r"(^|_)(AUTH|PWD|SAS|JWT)$|SIGNATURE|ODBC_CONNECT", re.IGNORECASE)
_NEW_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
# A setting of a connection string; a name contains no URL, and a bare `key` is no secret.
_SETTING = re.compile(r"(?:^|[;,])(?!\s*keys?\s*=)([^=;,:/?&]*)=([^;,]*)", re.IGNORECASE)
_QUOTED_PAIR = re.compile(r"""["']([^"']+)["']\s*:\s*["']([^"']+)["']""")
_LONE_TOKEN = 20  # a user name this long without a password is a token, unless it consists of words
_CONTAINER = ("abfs", "abfss", "wasb", "wasbs")  # URLs with a container in place of a user
_SHORTEST = 8  # shorter values occur in unrelated text
_GUESSABLE = 12  # so do shorter passwords made of words
_WORDS = re.compile(r"[A-Z]?[a-z]*[0-9]{0,8}([-_.][A-Z]?[a-z]*[0-9]{0,8})*")
HIDDEN = "***"
HIDDEN_IN_NAME = "hidden"  # tracking servers refuse asterisks in metric names


def is_secret(name: str) -> bool:
    """Tell whether an environment variable holds a secret, by its name.

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
    """Tell whether a variable's value contains a secret, independent of its name.

    >>> holds_secret("s3://key:secret@bucket"), holds_secret('{"client_kwargs": {"token": "t"}}')
    (True, True)
    >>> holds_secret("AccountName=a;AccountKey=k"), holds_secret('{"anon": true, "key": null}')
    (True, False)
    """
    return has_credentials(value) or bool(_named_secrets(value))


def is_secret_variable(name: str, value: str) -> bool:
    """Tell whether a variable is a secret, by its name or its value."""
    return is_secret(name) or holds_secret(value)


def find_secret(text: str, environment: Mapping[str, str]) -> tuple[int, str] | None:
    """Return index and description of the first secret in a text, or None.

    Args:
        text: such as a spec.
        environment: variables whose secret values are searched for.
    """
    for start, _ in _credentials(text):
        return start, "a URL with credentials"
    for name, value in secret_values(environment):
        if value in text:
            return text.index(value), f"the value of the environment variable {name}"
    return None


def secret_values(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of the secrets in an environment.

    A URL with credentials, JSON or a connection string gives its whole value and each secret in it,
    except short passwords made of words, such as `postgres`, which occur in unrelated text. Values
    of fewer than 8 characters are left out.

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
    """Return the values with secret names in JSON, JSON-like text or a connection string."""
    if not value.lstrip().startswith(("{", "[")):
        pairs = _SETTING.findall(value)
    else:
        try:
            return list(_secrets_of(json.loads(value), named=False))
        except (ValueError, RecursionError):
            pairs = _QUOTED_PAIR.findall(value)
    return [one.strip() for name, one in pairs if _names_secret(name.strip()) and one.strip()]


def _secrets_of(data: Any, named: bool) -> Iterator[str]:
    """Yield the texts and numbers under secret keys in JSON data."""
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
    """Tell whether a name inside a value, such as AccountKey or auth, is that of a secret."""
    words = _NEW_WORD.sub("_", name)
    return is_secret(words) or (_INNER_NAME.search(words) is not None and not _PLACE.search(words))


def _credentials(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of the secret parts of the URLs in a text."""
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
        environment: variables with the secrets; None for this process's.
    """
    if environment is None:
        return _redactor_here().data(value)
    return _redactor(frozenset(environment.items())).data(value)


def presentable(text: str) -> str:
    """Return a text without secrets, with control characters as escapes."""
    return printable(redact(text))


@functools.lru_cache(maxsize=4)
def _redactor(environment: frozenset[tuple[str, str]]) -> _Redactor:
    return _Redactor(dict(environment))


_here: tuple[Mapping[Any, Any], _Redactor] | None = None


def _redactor_here() -> _Redactor:
    """Return the redactor of this process's environment, renewed when that changes.

    Undecoded variables are compared: decoding them for each printed line takes ten times as long
    as the redaction.
    """
    global _here
    held: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
    if _here is None or _here[0] != held:
        _here = dict(held), _Redactor(dict(os.environ))
    return _here[1]


def _forms(value: str) -> set[str]:
    """Return the texts in which a secret may occur: itself, escaped, and its long lines."""
    escaped = {repr(value)[1:-1], json.dumps(value)[1:-1], quote(value), quote(value, safe="")}
    lines = {line for line in value.splitlines() if len(line) >= 2 * _SHORTEST}
    return {value, *escaped, *lines}


class _Redactor:
    def __init__(self, environment: Mapping[str, str]):
        known = {
            form
            for name, value in secret_values(environment)
            # a URL counts by its secret parts alone
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
