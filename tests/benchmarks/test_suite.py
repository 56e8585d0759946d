"""The benchmarks that are pipelines are valid, keep what they make apart, and run on a subset."""

from pathlib import Path

import pytest

from benchmarks.harness.suite import EXPERIMENTS, list_benchmarks
from pipeline.spec.load import load_spec

PIPELINES = [
    one.path for one in list_benchmarks() if one.is_pipeline and one.name not in EXPERIMENTS
]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_a_pipeline_is_valid_and_runnable_by_itself(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for network in ("resnet20_cifar10", "mlpnet_mnist"):
        (tmp_path / f"{network}.safetensors").touch()  # that there is one is enough
    monkeypatch.setenv("FISHLEG_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("FISHLEG_BENCHMARKS_STORE", str(tmp_path))
    assert load_spec(path).storage == str(tmp_path)
    assert path.read_text().startswith("#!/usr/bin/env -S python -m pipeline run\n")
    assert path.stat().st_mode & 0o111
