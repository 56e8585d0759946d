"""Fields of options: their ranges, and the check of a whole object at its construction.

The docstring of a class gives the meaning of each field, under `Attributes:`; its annotations give
type, choices, range and unit. Lists, documents and checks are made from the class alone. (Meanings
are no annotations, because annotations enter the digest of the code, and docstrings do not.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from fishleg.errors import InvalidOption, UnknownName, WrongOptionType


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values that a number may take; each bound is None where there is none.

    Attributes:
        ge: the least value.
        gt: a bound that the value is above.
        le: the greatest value.
        lt: a bound that the value is below.
        unit: of the number, such as "bytes".
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    unit: str = ""

    def __contains__(self, value: float) -> bool:
        """Tell whether a number is within all bounds; NaN is not within any."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        """Return the bounds in words.

        >>> [str(one) for one in (Range(ge=1), Range(gt=0), Range(ge=0, le=1), Range(ge=0, lt=1))]
        ['at least 1', '> 0', '0 to 1', 'a number in [0, 1)']
        """
        low = self.ge if self.ge is not None else self.gt
        high = self.le if self.le is not None else self.lt
        if high is None:
            return f"at least {low}" if self.ge is not None else f"> {low}"
        if low is None:
            return f"at most {high}" if self.le is not None else f"< {high}"
        if self.ge is not None and self.le is not None:
            return f"{low} to {high}"
        begin, end = "(" if self.ge is None else "[", ")" if self.le is None else "]"
        return f"a number in {begin}{low}, {high}{end}"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field's declaration.

    Attributes:
        name: the field's name.
        kinds: the types that a value may have: int, float, bool, str; NoneType where it may be
            None.
        choices: the names it may take, or none where it is no choice.
        range: the bounds of a number, or None.
    """

    name: str
    kinds: tuple[type, ...]
    choices: tuple[str, ...]
    range: Range | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all options; construction checks the type and the range of each field.

    A subclass is a frozen, keyword-only dataclass.

    Raises:
        UnknownName: a field is none of its choices.
        InvalidOption: a field has another type, or is out of range.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.__repr__ = Options.__repr__  # type: ignore[method-assign] # else dataclass makes one

    def __repr__(self) -> str:
        """Return the values that are not the defaults."""
        kind: Any = type(self)
        given = ((field, getattr(self, field.name)) for field in fields(kind))
        other = [f"{field.name}={value!r}" for field, value in given if value != field.default]
        return f"{kind.__name__}({', '.join(other)})"

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for field in declared(kind):
            check(field, getattr(self, field.name))

    @classmethod
    def taken_from(cls, owner: object) -> Self:
        """Return options with the values of an object's attributes of the same names."""
        names = (field.name for field in fields(cls) if hasattr(owner, field.name))
        return cls(**{name: getattr(owner, name) for name in names})


@cache
def declared(kind: type) -> tuple[Field, ...]:
    """Return the declarations of all fields of a dataclass of options."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_declaration(field.name, hints[field.name]) for field in fields(kind))


def check(field: Field, value: Any) -> None:
    """Check one value.

    Raises:
        UnknownName: it is none of the choices.
        WrongOptionType: it has another type.
        InvalidOption: it is out of range.
    """
    if field.choices and isinstance(value, str):
        if value not in field.choices:
            raise UnknownName(field.name, value, field.choices)
        return
    if not any(_is_a(value, kind) for kind in field.kinds):
        expected = " or ".join(_NAMES[kind] for kind in field.kinds)
        raise WrongOptionType(field.name, f"expected {expected}, got {value!r}")
    if field.range is not None and value is not None and value not in field.range:
        raise InvalidOption(field.name, f"expected {field.range}, got {value}")


_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a name",
    type(None): "None",
}
_NUMBERS: dict[type, type] = {int: Integral, float: Real}  # NumPy's belong to them


def _is_a(value: Any, kind: type) -> bool:
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    return isinstance(value, kind)


def _declaration(name: str, hint: Any) -> Field:
    bounds = None
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        bounds = next((one for one in metadata if isinstance(one, Range)), None)
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = tuple(c for part in parts if get_origin(part) is Literal for c in get_args(part))
    kinds = tuple(str if get_origin(part) is Literal else part for part in parts)
    return Field(name=name, kinds=kinds, choices=choices, range=bounds)
