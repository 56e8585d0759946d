"""Each invalid option of every stage and method is refused where the pipeline file gives it.

The options are found by introspection: the parameters of all stage types of the catalogue, nested
ones too, and what each built-in method takes in `options:`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fishleg.estimators import ESTIMATORS
from fishleg.options import ESTIMATOR_OPTIONS, EstimatorOptions, Field, declared
from pipeline.base.errors import SpecError
from pipeline.spec import yaml_loader
from pipeline.spec.load import load_spec
from pipeline.stage import Stage
from stages.catalogue import CATALOGUE, METHODS
from stages.reference import RENAMED

STAGES = [pytest.param(stage, id=stage.name) for stage in CATALOGUE.stages]
WITH_METHOD = [stage for stage in CATALOGUE.stages if "options" in stage.params.model_fields]
REQUIRED = {
    "dataset": "digits",
    "model": "mlpnet",
    "method": "obs",
    "path": "p.yaml",
    "sparsity": 0.5,
    "accuracy": [1.0],
}
BOUNDS: dict[type, tuple[str, int]] = {Ge: ("ge", -1), Le: ("le", 1), Gt: ("gt", 0), Lt: ("lt", 0)}
AT_ONCE = 20  # wrong values in a file; the loader stops after 50 problems
Place = tuple[str | int, ...]


def nested(info: FieldInfo) -> type[BaseModel] | None:
    """Return the model that a parameter, or each item of a list, is."""
    found = get_args(info.annotation) if get_origin(info.annotation) is list else [info.annotation]
    model = found[0]
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def leaves(model: type[BaseModel], place: Place = ()) -> Iterator[tuple[Place, FieldInfo]]:
    """Yield all parameters that hold no further ones."""
    for name, info in model.model_fields.items():
        inner = nested(info)
        if inner is None:
            yield (*place, name), info
        else:
            item = (0,) if get_origin(info.annotation) is list else ()
            yield from leaves(inner, (*place, name, *item))


def beyond(annotation: Any, metadata: list[Any]) -> Iterator[Any]:
    """Yield a value of the right type out of each bound, or a name that is none of the choices."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from beyond(inner[0], [*metadata, *inner[1:]])
    elif origin in (Union, UnionType):
        for one in inner:
            yield from beyond(one, metadata)
    elif origin is Literal:
        yield f"{inner[0]}x"
    elif origin is list:
        for wrong in beyond(inner[0], []):
            yield [wrong]
        yield from ([] for one in metadata if isinstance(one, MinLen))
    elif annotation in (int, float):
        for one in metadata:
            name, step = BOUNDS.get(type(one), ("", 0))
            if name:
                yield annotation(getattr(one, name) + step)


def put(params: dict[str, Any], place: Place, value: Any) -> None:
    """Put a value at its place, making the mappings and lists on the way."""
    at: Any = params
    for part, after in zip(place, place[1:], strict=False):
        empty: Any = [{}] if isinstance(after, int) else {}
        at = at[part] if isinstance(part, int) else at.setdefault(part, empty)
    at[place[-1]] = value


def problems(folder: Path, stage: Stage, params: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Return (line, column) -> what the loader says of a stage with these parameters."""
    file = folder / "p.yaml"
    spec = {"name": "p", "plugins": ["stages"]}
    spec |= {"stages": {"it": {"uses": stage.name, "params": params}}}
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    assert all(str(one).startswith(f"{file}:") for one in caught.value.problems)
    return {(one.position.line, one.position.column): one.message for one in caught.value.problems}


def where(folder: Path, place: Place, *, key: bool = False) -> tuple[int, int]:
    """Return the line and the column of a parameter's value, or of its name."""
    document = yaml_loader.load((folder / "p.yaml").read_text(), "p.yaml")
    position = document.position(("stages", "it", "params", *place), key=key)
    return position.line, position.column


def required(stage: Stage) -> dict[str, Any]:
    fields = stage.params.model_fields
    return {name: REQUIRED[name] for name, info in fields.items() if info.is_required()}


def assert_refused(folder: Path, stage: Stage, wrong: dict[Place, Any]) -> None:
    """Check that each wrong value is refused at its place, several in one file."""
    for some in batched(wrong):
        params = required(stage)
        for place in some:
            put(params, place, wrong[place])
        found = problems(folder, stage, params)
        for place in some:
            position = where(folder, place)
            inner = where(folder, (*place, 0))  # of a list, its item
            message = found.get(position) or found.get(inner)
            assert message, f"{place} is not refused at {position}: {found}"
            assert str(place[-1]) in message
            assert "expected" in message or "should have" in message  # of a list's length


def batched(places: Iterable[Place]) -> list[list[Place]]:
    """Return the places in lists of at most `AT_ONCE`."""
    known = list(places)
    return [known[start : start + AT_ONCE] for start in range(0, len(known), AT_ONCE)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_type_is_refused(stage: Stage, tmp_path: Path) -> None:
    def wrong(info: FieldInfo) -> Any:
        return [1] if get_origin(info.annotation) is dict else {"a": 1}

    all_leaves = {place: wrong(info) for place, info in leaves(stage.params)}
    assert_refused(tmp_path, stage, all_leaves)
    holders = {
        (name,): {"a": 1} if get_origin(info.annotation) is list else [1]
        for name, info in stage.params.model_fields.items()
        if nested(info)
    }
    if holders:
        assert_refused(tmp_path, stage, holders)


@pytest.mark.parametrize("stage", STAGES)
def test_a_value_out_of_range_is_refused(stage: Stage, tmp_path: Path) -> None:
    values = {p: list(beyond(i.annotation, i.metadata)) for p, i in leaves(stage.params)}
    bounded = [p for p, i in leaves(stage.params) if any(type(one) in BOUNDS for one in i.metadata)]
    assert all(values[place] for place in bounded)
    for turn in range(max(map(len, values.values()), default=0)):
        wrong = {place: found[turn] for place, found in values.items() if turn < len(found)}
        assert_refused(tmp_path, stage, wrong)


@pytest.mark.parametrize("stage", STAGES)
def test_a_misspelt_name_is_refused_with_the_nearest_one(stage: Stage, tmp_path: Path) -> None:
    misspelt = {(*place[:-1], f"{place[-1]}q"): place[-1] for place, _ in leaves(stage.params)}
    for some in batched(misspelt):
        params = required(stage)
        for place in some:
            put(params, place, 1)
        found = problems(tmp_path, stage, params)
        for place in some:
            message = found[where(tmp_path, place, key=True)]
            assert message == f"unknown key {place[-1]!r} (did you mean {misspelt[place]!r}?)"


# ------------------------------------------------------------------------------ methods' options


def options_of(method: str) -> list[Field]:
    """Return what `options:` of a method may hold."""
    common = [field for field in declared(EstimatorOptions) if field.name != "damping"]
    return [*declared(ESTIMATOR_OPTIONS[method]), *common]


def test_every_method_has_declared_options() -> None:
    assert set(ESTIMATOR_OPTIONS) == set(METHODS.entries) == set(ESTIMATORS)
    assert len(WITH_METHOD) == 3


@pytest.mark.parametrize("method", ESTIMATOR_OPTIONS)
@pytest.mark.parametrize("stage", WITH_METHOD, ids=lambda stage: stage.name)
def test_options_of_a_method_are_checked(stage: Stage, method: str, tmp_path: Path) -> None:
    fields = options_of(method)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("expected", {field.name: {"a": 1} for field in fields}),
        ("did you mean", {f"{field.name}q": 1 for field in fields}),
        ("unknown", {field.name: f"{field.choices[0]}x" for field in fields if field.choices}),
    ]
    for name, step in (("ge", -1), ("le", 1), ("gt", 0), ("lt", 0)):
        bounded = {f.name: getattr(f.range, name) for f in fields if f.range is not None}
        beyond = {option: at + step for option, at in bounded.items() if at is not None}
        cases.append(("expected", beyond))
    for says, wrong in cases:
        if not wrong:
            continue
        params = required(stage) | {"method": method, "options": wrong}
        found = problems(tmp_path, stage, params)
        for option in wrong:
            message = found[where(tmp_path, ("options", option))]
            assert message.startswith(f"options.{option}: ")
            assert says in message


@pytest.mark.parametrize(
    ("params", "place", "message"),
    [
        (
            {"method": "kfac", "options": {"dense_siz": 12}},
            ("options", "dense_siz"),
            "options.dense_siz: unknown kfac option 'dense_siz' (did you mean 'dense_size'?); "
            "known: dense_size, memory_limit",
        ),
        (
            {"method": "fishleg", "fishleg": {"structure": "eigen", "warm_start": "kfac"}},
            ("fishleg", "structure"),
            "fishleg.structure: 'eigen' is now a method of its own: write `method: eigen`, with "
            "its options under `eigen` (basis in place of warm_start); in Python, "
            "fishleg.estimators.Eigen",
        ),
        (
            {"method": "fishleg", "fishleg": {"steps": 5, "preconditioned_steps": 5}},
            ("fishleg", "preconditioned_steps"),
            "fishleg.preconditioned_steps: expected fewer than steps and refine_steps, so that "
            "plain steps come last, got 5",
        ),
        (
            {
                "method": "fishleg",
                "fishleg": {"structure": "tensor"},
                "options": {"solver": "alternating"},
            },
            ("options", "solver"),
            "options.solver: no alternating half-steps for the structure 'tensor'; use 'adam', or "
            "the structure 'kronecker'",
        ),
        (
            {"method": "obs", "labels": "empirical", "draws": 3},
            ("draws",),
            "draws: expected 1, or more with sampled or matched labels, got 3",
        ),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, params: dict[str, Any], place: Place, message: str
) -> None:
    stage = next(one for one in CATALOGUE.stages if one.name == "curvature")
    assert problems(tmp_path, stage, params)[where(tmp_path, place)] == message


@pytest.mark.parametrize("stage", WITH_METHOD, ids=lambda stage: stage.name)
def test_rules_between_options_hold_in_every_stage(stage: Stage, tmp_path: Path) -> None:
    params = required(stage) | {"labels": "enumerated", "draws": 2}
    message = problems(tmp_path, stage, params)[where(tmp_path, ("draws",))]
    assert message == "draws: expected 1, or more with sampled or matched labels, got 2"


def test_options_of_your_own_method_are_its_own_matter(tmp_path: Path) -> None:
    stage = next(one for one in CATALOGUE.stages if one.name == "curvature")
    params = {"method": "fishleg.estimators:KFAC", "options": {"any": {"thing": 1}}}
    found = problems(tmp_path, stage, params)
    assert list(found.values()) == ["missing input 'model': a 'model'"]


OWN_NETWORKS = """
raise ImportError("nothing is imported to validate a file")

class Net:
    def __init__(self, num_classes, *, depth=2): ...

def anything(num_classes, **options): ...

@wrapped
def decorated(num_classes): ...
"""


@pytest.mark.parametrize(
    ("params", "wrong", "message"),
    [
        ({"model": "digits_resnet"}, ("model_args", "widht"), "(did you mean 'width'?)"),
        ({"model": "own_networks:Net"}, ("model_args", "depht"), "(did you mean 'depth'?)"),
        ({"dataset": "digits"}, ("dataset_args", "image_size"), "known: none"),
        (
            {"dataset": "folder:x"},
            ("dataset_args", "image"),
            "(did you mean 'image_size'?); known: background, image_size, upright",
        ),
    ],
)
def test_options_of_networks_and_data_are_checked_without_imports(
    params: dict[str, Any],
    wrong: Place,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own_networks.py").write_text(OWN_NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("pretrain", "import_checkpoint"):
        stage = next(one for one in CATALOGUE.stages if one.name == name)
        given: dict[str, Any] = {**required(stage), **params}
        put(given, wrong, 3)
        found = problems(tmp_path, stage, given)
        assert message in found[where(tmp_path, wrong)], found


@pytest.mark.parametrize("model", ["anything", "decorated", "absent"])
def test_options_that_the_source_does_not_tell_are_left_to_the_worker(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_networks.py").write_text(OWN_NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    params = {"dataset": "digits", "model": f"own_networks:{model}", "model_args": {"depth": 3}}
    CATALOGUE.stages[0].params.model_validate(params)


@pytest.mark.parametrize("old", RENAMED)
def test_an_earlier_name_is_refused_with_the_present_one(old: str, tmp_path: Path) -> None:
    stage = next(one for one in CATALOGUE.stages if one.name == "curvature")
    message = problems(tmp_path, stage, {"method": old})[where(tmp_path, ("method",))]
    assert message == f"method: {old!r} is now {RENAMED[old]!r}"


def test_an_earlier_key_is_refused_with_the_present_one(tmp_path: Path) -> None:
    stage = next(one for one in CATALOGUE.stages if one.name == "prune_multistep")
    params = {**required(stage), "refinement": {"last_steps": 5}}
    message = problems(tmp_path, stage, params)
    place = where(tmp_path, ("refinement", "last_steps"), key=True)
    assert "did you mean 'steps'?" in message[place]
