"""The files in deploy/: their shape is the one that their readers publish.

The RayJob's is written down here, because the schema itself has more than a megabyte. It was
compared by eye, field by field, with version v1 in ray-project/kuberay's helm-chart/
kuberay-operator/crds/ray.io_rayjobs.yaml at 47463ccf4e626d18cac0e5e8a9e074c41e0ad792; what is
said to be the operator's, with ray-operator/controllers/ray/utils/validation.go at that commit
(the length of a name: constant.go at dc85903b61ab6068b752ea8f56db028c456c890a). At
b8f106b088883857812dc927b5b801733bb929db all of it but the containers was compared again, and is
the same. Both are of the development after 1.5.1; no release's own file was at hand.

Admitted is only what we use. Not covered: what Kubernetes checks once it makes a pod (names,
requests above limits, that image and secret exist), two containers of one name, explicit nulls,
and all that only a cluster shows.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.spec.load import load_spec

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]  # an int32, which the operator wants not negative
NUMBER = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)"
SUFFIX = rf"([KMGTPE]i|[numkMGTPE]|[eE][+-]?{NUMBER})"
Quantity = int | Annotated[str, Field(pattern=rf"^[+-]?{NUMBER}{SUFFIX}?$")]


class Shape(BaseModel):
    """Strict about names too: the server would drop an unknown field, and kubectl refuses it."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SecretRef(Shape):
    name: str = ""


class EnvFrom(Shape):
    secretRef: SecretRef = SecretRef()


class Resources(Shape):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class Container(Shape):
    name: str
    image: str = ""
    envFrom: list[EnvFrom] = []
    resources: Resources = Resources()


class PodSpec(Shape):
    containers: list[Container] = Field(min_length=1)  # one: the operator


class PodTemplate(Shape):
    spec: PodSpec  # optional; but then the operator misses the container


class HeadGroup(Shape):
    rayStartParams: dict[str, str] = {}
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: Int32 = 0
    minReplicas: Natural
    maxReplicas: Natural

    @model_validator(mode="after")
    def check_as_the_operator_does(self) -> Self:
        if self.minReplicas > self.maxReplicas:
            raise ValueError("minReplicas is above maxReplicas")
        return self


class AuthOptions(Shape):
    mode: Literal["disabled", "token"] = "disabled"  # no default; but without it nothing is on


class Cluster(Shape):
    rayVersion: str = ""
    authOptions: AuthOptions = AuthOptions()
    enableInTreeAutoscaling: bool = False
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []

    @model_validator(mode="after")
    def check_as_the_operator_does(self) -> Self:
        version = [int(part) for part in re.findall(r"\d+", self.rayVersion)]
        if self.authOptions.mode == "token" and version < [2, 52]:
            raise ValueError("tokens need a rayVersion, of 2.52 or newer")
        return self


class JobSpec(Shape):
    entrypoint: str = ""
    backoffLimit: Natural = 0
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Natural = 0
    rayClusterSpec: Cluster  # optional; but the operator wants it or a clusterSelector

    @model_validator(mode="after")
    def check_as_the_operator_does(self) -> Self:
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class Metadata(Shape):  # any object; the name's form and length are the operator's
    name: str = Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)


class RayJob(Shape):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


def read(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_rayjob_has_the_published_shape() -> None:
    cluster = RayJob.model_validate(read("rayjob.yaml")).spec.rayClusterSpec
    for group in [cluster.headGroupSpec, *cluster.workerGroupSpecs]:
        for container in group.template.spec.containers:
            assert container.image
            assert container.resources.requests == container.resources.limits != {}
            secrets = [source.secretRef.name for source in container.envFrom]
            assert secrets == ["fishleg"]  # which the file's head tells to make
    assert all(
        one.minReplicas <= one.replicas <= one.maxReplicas for one in cluster.workerGroupSpecs
    )


CLUSTER = "spec/rayClusterSpec"
WORKERS = f"{CLUSTER}/workerGroupSpecs/0"
CPUS = f"{WORKERS}/template/spec/containers/0/resources/limits/cpu"


@pytest.mark.parametrize(
    ("place", "value", "refusal"),
    [
        ("apiVersion", "ray.io/v1alpha1", "literal_error"),
        ("metadata/name", "1-digit-first", "string_pattern_mismatch"),
        ("metadata/name", "d" * 48, "string_too_long"),
        ("spec/ttlSecondAfterFinished", 600, "extra_forbidden"),
        ("spec/shutdownAfterJobFinishes", "true", "bool_type"),
        ("spec/shutdownAfterJobFinishes", False, "value_error"),
        ("spec/backoffLimit", "3", "int_type"),
        ("spec/backoffLimit", -1, "greater_than_equal"),
        ("spec/backoffLimit", 2**31, "less_than"),
        (f"{CLUSTER}/workerGroupSpec", [], "extra_forbidden"),
        (f"{CLUSTER}/rayVersion", 2.6, "string_type"),
        (f"{CLUSTER}/rayVersion", "2.51.1", "value_error"),
        (f"{CLUSTER}/authOptions/mode", "tokens", "literal_error"),
        (f"{CLUSTER}/headGroupSpec", {}, "missing"),
        (f"{CLUSTER}/headGroupSpec/rayStartParams/num-cpus", 0, "string_type"),
        (f"{CLUSTER}/headGroupSpec/template/spec/containers", [], "too_short"),
        (f"{WORKERS}/minReplicas", 3, "value_error"),
        (CPUS, 0.5, "int_type"),
        (CPUS, "4 cores", "string_pattern_mismatch"),
        (CPUS, "16GB", "string_pattern_mismatch"),
    ],
)
def test_a_wrong_rayjob_is_refused(place: str, value: object, refusal: str) -> None:
    wrong = read("rayjob.yaml")
    *way, last = place.split("/")
    at: Any = wrong
    for key in way:
        at = at[int(key) if key.isdigit() else key]
    at[last] = value
    with pytest.raises(ValidationError) as refused:
        RayJob.model_validate(wrong)
    assert refusal in {error["type"] for error in refused.value.errors()}


def test_quantities_are_whole_numbers_or_strings_with_a_suffix() -> None:
    amounts: list[int | str] = [2, "2", "0.5", ".5", "1.", "500m", "8Gi", "8G", "1e3", "-1E-2"]
    limits = {f"example.com/{n}": n for n in amounts}
    assert Resources(limits=limits).limits == limits


def test_the_rayjob_runs_what_there_is_on_the_ray_that_is_pinned() -> None:
    job = RayJob.model_validate(read("rayjob.yaml"))
    *command, file = job.spec.entrypoint.split()
    assert command == ["python", "-m", "pipeline", "run"]
    assert (ROOT / Path(file).name).is_file()
    pins = (ROOT / "constraints.txt").read_text()
    assert f"\nray=={job.spec.rayClusterSpec.rayVersion}\n" in pins
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    image = job.spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].image
    assert image.endswith(f":{version[1]}")


def test_the_cluster_file_has_the_shape_that_ray_ships() -> None:
    (ray,) = find_spec("ray").submodule_search_locations  # without importing it
    schema = json.loads((Path(ray) / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read("cluster.yaml"), schema)


def test_autoscaling_is_declared_in_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "pipeline.yaml").read_text()
    assert not load_spec(ROOT / "pipeline.yaml").autoscaling
    (tmp_path / "p.yaml").write_text(text + "cluster: {autoscaling: true}\n")
    assert load_spec(tmp_path / "p.yaml").autoscaling
