import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fishleg

PACKAGES = [
    "fishleg",
    "fishleg.blocks",
    "fishleg.estimators",
    "fishleg.optim",
    "fishleg.pruning",
    "fishleg.solvers",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_lists_what_the_package_offers(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    bound = {
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert bound <= set(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        getattr(module, name)


def test_every_estimator_is_exported_under_its_name():
    for name, estimator in fishleg.ESTIMATORS.items():
        assert estimator.name == name
        assert getattr(fishleg, estimator.__name__) is estimator


def test_the_library_needs_torch_only():
    """Whatever torch itself loads is no concern of ours; these it does not."""
    heavy = [
        "ray",
        "mlflow",
        "torchvision",
        "pydantic",
        "yaml",
        "safetensors",
        "pipeline",
        "stages",
    ]
    code = f"import fishleg, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
