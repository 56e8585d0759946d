import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fishleg

PACKAGES = [
    "fishleg.blocks",
    "fishleg.estimators",
    "fishleg.optim",
    "fishleg.options",
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


def test_a_checker_sees_the_names_that_the_library_imports_at_first_use():
    tree = ast.parse(Path(fishleg.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.asname: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: fishleg._HOMES[name] for name in fishleg.__all__}
    assert {*fishleg.__all__, "__version__"} <= set(dir(fishleg))
    for name in fishleg.__all__:
        getattr(fishleg, name)
    with pytest.raises(AttributeError, match="has no attribute 'FishLeg2'"):
        _ = fishleg.FishLeg2


def test_a_submodule_is_imported_at_its_first_use():
    code = "import fishleg; print(fishleg.pruning.refine.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refine"


def test_the_library_knows_its_version_and_has_types():
    assert fishleg.__version__ == version("fishleg-surgeon")
    assert (Path(fishleg.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("module", ["fishleg", "fishleg.options", "fishleg.errors"])
def test_options_need_no_torch(module):
    code = f"import {module}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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
    found = f"[name for name in {heavy} if name in sys.modules]"
    code = f"import sys; from fishleg import *; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
