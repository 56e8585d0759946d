"""The catalogue: light, complete, documented, and in step with the code it names."""

import importlib
import subprocess
import sys

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fishleg.options import EigenOptions, FishLegOptions
from pipeline.stage import Estimate, Registry, Stage
from stages.catalogue import (
    CATALOGUE,
    CurvatureParams,
    FinetuneParams,
    GradualParams,
    MultistepParams,
    OneshotParams,
    PretrainParams,
    estimate_curvature,
    estimate_training,
)


def test_the_catalogue_imports_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "ray", "mlflow", "yaml"]
    code = "import sys, stages.catalogue; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = ran.stdout.split()
    assert not {*heavy} & {*loaded}
    science = {name for name in loaded if name.startswith("fishleg.")}
    assert {name.split(".")[1] for name in science} == {"errors", "options"}


def test_every_entry_point_exists_and_no_stage_imports_the_catalogue() -> None:
    lines = [f"from {stage.entry.replace(':', ' import ')}" for stage in CATALOGUE.stages]
    lines += ["import sys", "assert 'stages.catalogue' not in sys.modules"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def fields(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    return [(f"{model.__name__}.{name}", field) for name, field in model.model_fields.items()]


@pytest.mark.parametrize("stage", CATALOGUE.stages, ids=lambda stage: stage.name)
def test_every_parameter_is_described(stage: Stage) -> None:
    for name, field in fields(stage.params):
        assert field.description, name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for inner, described in fields(field.annotation):
                assert described.description, inner


@pytest.mark.parametrize("registry", CATALOGUE.registries, ids=lambda registry: registry.kind)
def test_every_name_stands_for_something(registry: Registry) -> None:
    for name, entry in [*registry.entries.items(), *registry.prefixes.items()]:
        module, _, attribute = entry.target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute)), name
        assert entry.summary, name


def test_what_is_said_of_a_method_is_what_it_does() -> None:
    """`obs` sums each block and inverts it by Cholesky; the identity of Woodbury is M-FAC's."""
    methods = next(one for one in CATALOGUE.registries if one.kind == "curvature method")
    assert "dense diagonal blocks" in methods.entries["obs"].summary
    assert not [one for one in methods.entries.values() if "Woodbury" in one.summary]


def test_options_of_an_optimizer_not_used_do_not_enter_the_key() -> None:
    options = {"dataset": "digits", "model": "mlpnet", "fishleg_optimizer": {"damping": 0.5}}
    unused, used = (PretrainParams(**options, optimizer=name) for name in ("sgd", "fishleg"))
    assert unused == PretrainParams(dataset="digits", model="mlpnet")
    assert used.fishleg_optimizer.damping == 0.5
    assert estimate_training(used, []) == Estimate()


def test_memory_and_disk_are_forecast_where_the_network_is_known() -> None:
    dense = PretrainParams(dataset="digits", model="resnet18")
    known = estimate_training(dense, [])
    assert known.disk_bytes == 5 * 4 * 11_173_962  # two checkpoints with momentum, one result
    assert known.memory_bytes is not None
    assert known.memory_bytes > 3 * 4 * 11_173_962
    assert estimate_training(FinetuneParams(), [OneshotParams(sparsity=0.5), dense]) == known
    halved = dense.model_copy(update={"model_args": {"width": 32}})
    assert estimate_training(halved, []).disk_bytes == pytest.approx(known.disk_bytes / 4)
    mine = dense.model_copy(update={"model": "my.module:network"})
    assert estimate_training(mine, []) == Estimate()
    blocks = estimate_curvature(CurvatureParams(method="obs"), [dense])
    assert blocks.disk_bytes == 64 * 4 * 11_173_962
    few = estimate_curvature(CurvatureParams(method="mfac", samples=100), [dense])
    assert few.disk_bytes == 100 * 4 * 11_173_962


def test_only_the_stage_that_refines_its_estimate_departs_from_the_librarys_defaults() -> None:
    for kind in (CurvatureParams, MultistepParams, GradualParams):
        assert EigenOptions.taken_from(kind.model_fields["eigen"].default) == EigenOptions()
    for kind in (CurvatureParams, MultistepParams):
        assert FishLegOptions.taken_from(kind.model_fields["fishleg"].default) == FishLegOptions()
    refined = GradualParams(method="fishleg", sparsity=0.5, fishleg={"sweeps": 3}).fishleg
    assert (refined.structure, refined.warm_start, refined.sweeps) == ("kronecker", "moments", 3)
