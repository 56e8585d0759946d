"""Stage parameters made of the library's options: the same fields, defaults, ranges and rules."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, NoReturn, dataclass_transform, get_type_hints

from pydantic import Field, ValidationError, model_validator
from pydantic._internal._model_construction import ModelMetaclass  # it has no public name
from pydantic_core import InitErrorDetails, PydanticCustomError

from fishleg.options import InvalidOption, Options, Range, UnknownName, declared
from pipeline.stage import Params

OptionError = InvalidOption | UnknownName


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
class _FromOptions(ModelMetaclass):
    """Gives a class of parameters the fields of the options classes among its bases.

    A field that the class declares itself keeps its annotation and default, with the range and the
    meaning of the option. An option that the class makes a `ClassVar` is no parameter.
    """

    def __new__(
        mcs,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        **keywords: Any,
    ) -> type:
        """Return the class; the options are bases for type checkers only."""
        kinds = tuple(base for base in bases if is_dataclass(base))
        own = namespace.get("__annotations__", {})
        annotations: dict[str, Any] = {}
        for kind in kinds:
            hints, meaning = get_type_hints(kind, include_extras=True), meanings(kind)
            for option in declared(kind):
                annotations[option.name] = own.get(option.name, hints[option.name])
                if str(own.get(option.name, "")).startswith("ClassVar"):
                    continue
                bounds = option.range or Range()
                namespace[option.name] = Field(
                    default=namespace.get(option.name, getattr(kind, option.name)),
                    description=meaning[option.name],
                    ge=bounds.ge,
                    gt=bounds.gt,
                    le=bounds.le,
                    lt=bounds.lt,
                )
        namespace["__annotations__"] = {**annotations, **own}
        real = tuple(base for base in bases if base not in kinds)
        made: Any = super().__new__(mcs, name, real, namespace, **keywords)
        inherited = [one for base in real for one in getattr(base, "options_kinds", ())]
        made.options_kinds = tuple(dict.fromkeys([*kinds, *inherited]))
        return made


class OptionParams(Params, metaclass=_FromOptions):
    """Base of parameters that are the library's options: list the options class as a base, too.

        class ObsParams(OptionParams, ObsOptions):
            ...

    Type checkers see the fields. At run time an instance is no instance of the options; see
    `Options.taken_from`.

    Attributes:
        options_kinds: the options classes that its fields are of.
    """

    options_kinds: ClassVar[tuple[type[Options], ...]] = ()

    @model_validator(mode="after")
    def _as_the_library_has_it(self) -> OptionParams:
        """Make the options, which refuses values that do not fit each other."""
        for kind in self.options_kinds:
            try:
                kind.taken_from(self)
            except (InvalidOption, UnknownName) as error:
                refuse([(error, (error.option,))])
        return self


def refuse(errors: Iterable[tuple[OptionError, tuple[str, ...]]]) -> NoReturn:
    """Raise pydantic's error, with the place of each option among the parameters.

    Args:
        errors: each with its place below the value that is being validated.
    """
    details = [
        InitErrorDetails(
            type=PydanticCustomError("option", "{reason}", {"reason": error.reason}),
            loc=place,
            input=None,
        )
        for error, place in errors
    ]
    refused = ValidationError.from_exception_data("options", details)
    raise refused


def reset(params: Params, *names: str) -> None:
    """Give fields their defaults, so that unused values stay out of the key."""
    for name in names:
        object.__setattr__(params, name, type(params).model_fields[name].default)


@cache
def meanings(kind: type) -> dict[str, str]:
    """Return field -> the first sentence about it in the docstrings of an options class.

    >>> from fishleg.options import KfacOptions
    >>> meanings(KfacOptions)
    {'dense_size': 'entries up to which a group without a layer gets its full Fisher'}
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for name, meaning in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE):
            found[name] = re.split(r"\. |\.$", " ".join(meaning.split()), maxsplit=1)[0]
    return {field.name: found.get(field.name, "") for field in fields(kind)}
