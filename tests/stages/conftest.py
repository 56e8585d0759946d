"""Fixtures of the stages' tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running_stages import TINY, Ran, run_stage


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A tiny network trained on the digits, just enough to be worth pruning."""
    params = {**TINY, "epochs": 12, "batch_size": 32, "lr": 0.1}
    return run_stage("pretrain", tmp_path_factory.mktemp("dense"), params)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the published networks and data; see CONTRIBUTING.md."""
    folder = os.environ.get("FISHLEG_TEST_ASSETS")
    if not folder:
        missing = "FISHLEG_TEST_ASSETS is not set: no published networks and data to test with"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return Path(folder)


@pytest.fixture(scope="session")
def published(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the published CIFAR-10 and MNIST."""
    root = tmp_path_factory.mktemp("published")
    unpack = [sys.executable, str(assets / "data" / "unpack.py"), str(root)]
    subprocess.run(unpack, check=True, capture_output=True)
    return root
