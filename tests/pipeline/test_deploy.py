"""The files in deploy/: their shape is the one that their readers publish.

The RayJob's is written down here, field by field, after KubeRay's API reference (ray.io/v1 of
KubeRay 1.5.1 to 1.7.1; the generated CRD itself has more than a megabyte). Of a container, only
what we use is admitted.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.spec import load_spec

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([KMGT]i?|m)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SecretRef(Shape):
    name: Name


class EnvFrom(Shape):
    secretRef: SecretRef


class Resources(Shape):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Container(Shape):
    name: Name
    image: str
    envFrom: list[EnvFrom]
    resources: Resources


class PodSpec(Shape):
    containers: list[Container] = Field(min_length=1)


class PodTemplate(Shape):
    spec: PodSpec


class HeadGroup(Shape):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int = 0
    minReplicas: int = 0
    maxReplicas: int
    numOfHosts: int = 1


class AuthOptions(Shape):
    mode: Literal["token", "disabled"]


class Cluster(Shape):
    rayVersion: str
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool = False
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []


class JobSpec(Shape):
    entrypoint: str = ""
    backoffLimit: int = 0
    activeDeadlineSeconds: int | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = 0
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = (
        "K8sJobMode"
    )
    runtimeEnvYAML: str = ""
    metadata: dict[str, str] = {}
    rayClusterSpec: Cluster


class Metadata(Shape):
    name: Name


class RayJob(Shape):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


def read(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_rayjob_has_the_published_shape() -> None:
    job = RayJob.model_validate(read("rayjob.yaml"))
    cluster = job.spec.rayClusterSpec
    for group in [cluster.headGroupSpec, *cluster.workerGroupSpecs]:
        for container in group.template.spec.containers:
            assert container.resources.requests == container.resources.limits
    assert all(
        one.minReplicas <= one.replicas <= one.maxReplicas for one in cluster.workerGroupSpecs
    )
    wrong = read("rayjob.yaml")
    wrong["spec"]["rayClusterSpec"]["workerGroupSpec"] = []
    with pytest.raises(ValidationError, match="workerGroupSpec"):
        RayJob.model_validate(wrong)


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
