"""Options: each declared once, checked at construction, and accepted by what they configure."""

import inspect
from dataclasses import MISSING, asdict, fields
from typing import get_type_hints

import pytest
from torch import nn

from fishleg import ESTIMATORS, FishLeg, InvalidOption, UnknownName, partition_parameters
from fishleg.options import (
    ESTIMATOR_OPTIONS,
    CalibrationOptions,
    EigenChanges,
    EigenOptions,
    EstimatorOptions,
    Field,
    FishLegChanges,
    FishLegOptions,
    FlsChanges,
    FlsOptions,
    Options,
    PruningOptions,
    RefinementOptions,
    StepOptions,
    TrackingOptions,
    declared,
)

KINDS = sorted(
    {
        *ESTIMATOR_OPTIONS.values(),
        CalibrationOptions,
        EstimatorOptions,
        PruningOptions,
        RefinementOptions,
        StepOptions,
        TrackingOptions,
    },
    key=lambda kind: kind.__name__,
)
FIELDS = [
    pytest.param(kind, field, id=f"{kind.__name__}.{field.name}")
    for kind in KINDS
    for field in declared(kind)
]


def beyond(field: Field) -> list[float]:
    """Return a number beyond each bound, and none of all numbers."""
    bounds = field.range
    assert bounds is not None
    found = [float("nan")] if float in field.kinds else []
    for bound, step in ((bounds.ge, -1), (bounds.le, 1), (bounds.gt, 0), (bounds.lt, 0)):
        if bound is not None:
            found.append(bound + step)
    return found


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_each_field_refuses_other_types_and_values_out_of_range(
    kind: type[Options], field: Field
) -> None:
    with pytest.raises(InvalidOption, match=f"^{field.name}: expected .*, got {{}}"):
        kind(**{field.name: {}})
    if field.choices:
        with pytest.raises(UnknownName, match=f"^Unknown {field.name} 'other'.* Known: "):
            kind(**{field.name: "other"})
    for number in beyond(field) if field.range else ():
        with pytest.raises(InvalidOption, match=f"^{field.name}: expected .*, got {number}"):
            kind(**{field.name: number})


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_frozen_and_described(kind: type[Options]) -> None:
    options = kind()
    assert kind.__doc__
    described = "".join(base.__doc__ or "" for base in kind.__mro__)
    for field in fields(kind):
        assert field.default is not MISSING
        assert f"        {field.name}: " in described
        with pytest.raises(AttributeError):
            setattr(options, field.name, None)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_takes_the_options_that_are_declared(name: str) -> None:
    partition = partition_parameters(nn.Linear(2, 2))
    given = asdict(ESTIMATOR_OPTIONS[name]())
    estimator = ESTIMATORS[name](partition, damping=0.1, memory_limit=None, **given)
    assert estimator.options == ESTIMATOR_OPTIONS[name]()
    assert ESTIMATORS[name](partition, damping=0.1).options == estimator.options
    accepted = set(inspect.signature(ESTIMATORS[name]).parameters)
    if name not in {"eigen", "fishleg", "fls"}:
        assert accepted == {"partition", "damping", "memory_limit", *given}


def test_keywords_of_options_with_changes_are_the_options() -> None:
    assert get_type_hints(EigenChanges) == get_type_hints(EigenOptions)
    assert get_type_hints(FishLegChanges) == get_type_hints(FishLegOptions)
    assert get_type_hints(FlsChanges) == get_type_hints(FlsOptions)


def test_fishleg_takes_options_and_changes_of_them() -> None:
    partition = partition_parameters(nn.Linear(2, 2))
    tensor = FishLegOptions(structure="tensor", steps=90)
    assert FishLeg(partition, damping=0.1, options=tensor).options == tensor
    changed = FishLeg(partition, damping=0.1, options=tensor, steps=100).options
    assert changed == FishLegOptions(structure="tensor", steps=100)


def test_several_labels_are_drawn_only_where_labels_are_drawn() -> None:
    with pytest.raises(InvalidOption, match="draws: expected 1, or more with sampled or matched"):
        CalibrationOptions(labels="enumerated", draws=2)


def test_an_error_names_the_option_and_the_reason() -> None:
    with pytest.raises(InvalidOption) as caught:
        FishLegOptions(structure="tensor", solver="alternating")
    assert caught.value.option == "solver"
    assert str(caught.value) == f"solver: {caught.value.reason}."
