"""Pickles and forged files in the place of checkpoints, outputs and in-stage states: never run."""

import ast
import json
import os
import pickle
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from running_stages import TINY, Ran, run_stage

from pipeline.base.errors import PipelineError
from pipeline.planning.keys import known_calls
from pipeline.spec.load import load_spec
from pipeline.stage import StageError, call_text, only_calls
from pipeline.tracking.model import pack
from stages.data.source import DataSource
from stages.reference import Reference, refer

ROOT = Path(__file__).parents[2]
REFUSED = r"expected a safetensors file, got a pickle, which can run any code when it is read; it"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def plant(path: Path, form: str) -> Path:
    """Put a malicious pickle at `path`; return the folder that reading it would make."""
    executed = path.parent / "executed"
    if form == "torch":
        torch.save(Evil(executed), path)
    else:
        path.write_bytes(pickle.dumps(Evil(executed), protocol=int(form)))
    return executed


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("dense")
    return run_stage("pretrain", folder, {**TINY, "epochs": 1, "batch_size": 256})


@pytest.mark.parametrize("form", ["torch", "0", "2", "5"])
def test_the_planted_pickle_would_run(tmp_path: Path, form: str) -> None:
    executed = plant(tmp_path / "x.pt", form)
    if form == "torch":
        torch.load(tmp_path / "x.pt", weights_only=False)
    else:
        pickle.loads((tmp_path / "x.pt").read_bytes())  # noqa: S301 - made here
    assert executed.exists()


@pytest.mark.parametrize("form", ["torch", "0", "2", "5"])
def test_a_pickle_given_as_checkpoint(tmp_path: Path, form: str) -> None:
    executed = plant(tmp_path / "x.pt", form)
    params = {**TINY, "path": str(tmp_path / "x.pt")}
    expected = "expected a safetensors file, got" if form == "0" else REFUSED  # text, like any
    with pytest.raises(StageError, match=expected):
        run_stage("import_checkpoint", tmp_path / "stage", params)
    assert not executed.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "masks.safetensors"])
def test_a_pickle_in_an_output(tmp_path: Path, dense: Ran, file: str) -> None:
    """The manifest would tell; here even that is forged, so the stage itself meets the file."""
    model = shutil.copytree(dense.output(), tmp_path / "model")
    executed = plant(model / file, "torch")
    with pytest.raises(StageError, match=REFUSED):
        run_stage("evaluate", tmp_path / "stage", {}, {"models": model})
    assert not executed.exists()


def test_a_pickle_in_an_in_stage_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text('{"format": 1, "cursor": {}, "states": {}}')
    executed = plant(checkpoint / "checkpoint.safetensors", "torch")
    with pytest.raises(StageError, match=REFUSED):
        run_stage("pretrain", tmp_path, {**TINY, "epochs": 1})
    assert not executed.exists()


# ------------------------------------------------- names of code that a stored file holds


def forge(folder: Path, monkeypatch: pytest.MonkeyPatch, *path: str) -> Path:
    """Let `model.json` name a module that makes a file when it is imported."""
    (folder.parent / "evil_module.py").write_text(
        f"from pathlib import Path\nPath({str(folder.parent / 'executed')!r}).touch()\n"
        "def build(*_, **__): ...\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    facts = json.loads((folder / "model.json").read_text())
    place = facts
    for part in path:
        place = place[part]
    place["target"] = "evil_module:build"
    (folder / "model.json").write_text(json.dumps(facts))
    return folder.parent / "executed"


def known_of(folder: Path) -> list[str]:
    """Return what the parameters behind a model folder stand for, as the runner knows it."""
    facts = json.loads((folder / "model.json").read_text())
    network, data = facts["network"], facts["data"]
    return [
        call_text(network["target"], network["argument"], facts["model_args"]),
        call_text(data["reference"]["target"], data["reference"]["argument"], data["args"]),
    ]


@pytest.mark.parametrize("path", [("network",), ("data", "reference")])
def test_code_that_a_stored_file_names_is_not_imported(
    tmp_path: Path, dense: Ran, monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...]
) -> None:
    model = shutil.copytree(dense.output(), tmp_path / "model")
    known = known_of(model)
    with only_calls(known):
        run_stage("evaluate", tmp_path / "before", {}, {"models": model})
    executed = forge(model, monkeypatch, *path)
    with (
        only_calls(known),
        pytest.raises(
            StageError, match=r"'evil_module:build' to be imported.*, which no parameter"
        ),
    ):
        run_stage("evaluate", tmp_path / "after", {}, {"models": model})
    assert not executed.exists()
    Reference(name="x", target="evil_module:build").load()  # outside the runner it would be
    assert executed.exists()


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("network", "argument"), "evil", "digits_resnet' to be imported and called with 'evil'"),
        (("data", "reference", "argument"), "x", "load' to be imported and called with 'x'"),
        (("model_args",), {"weights": "http://evil"}, 'given {"weights": "http://evil"}'),
        (("data", "args"), {"path": "/etc"}, 'given {"path": "/etc"}'),
    ],
)
def test_a_stored_file_does_not_say_how_code_is_called(
    tmp_path: Path, dense: Ran, path: tuple[str, ...], value: object, named: str
) -> None:
    model = shutil.copytree(dense.output(), tmp_path / "model")
    known = known_of(model)
    facts = json.loads((model / "model.json").read_text())
    place = facts
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    (model / "model.json").write_text(json.dumps(facts))
    with only_calls(known), pytest.raises(StageError, match=re.escape(named)):
        run_stage("evaluate", tmp_path / "after", {}, {"models": model})


def test_what_may_be_imported_holds_in_threads_too() -> None:
    with only_calls([call_text("stages.data.digits:load")]), ThreadPoolExecutor() as pool:
        pool.submit(Reference(name="x", target="stages.data.digits:load").load).result()
        with pytest.raises(StageError, match="'site:addsitedir' to be imported, which no"):
            pool.submit(Reference(name="x", target="site:addsitedir").load).result()


def test_a_model_that_is_packed_for_a_registry_imports_what_its_cell_knows(
    tmp_path: Path, dense: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(dense.output(), tmp_path / "model")
    known = known_of(model)
    executed = forge(model, monkeypatch, "network")
    with pytest.raises(PipelineError, match="'evil_module:build' to be imported"):
        pack("stages.exporter:load", known, model, tmp_path / "packed")
    assert not executed.exists()


def test_a_pipeline_knows_how_its_own_code_is_called(tmp_path: Path) -> None:
    """The texts that the runner makes of parameters are those that stages make of stored files."""
    (tmp_path / "p.yaml").write_text(
        "name: x\nplugins: [stages]\nstages:\n"
        "  pretrain: {uses: pretrain, params: {model: digits_resnet, model_args: {width: 4}, "
        "dataset: digits}}\n"
        "  import: {uses: import_checkpoint, params: {model: torchvision/resnet18, dataset: "
        f"'folder:{tmp_path}', path: {tmp_path}/p.yaml}}}}\n"
        "  evaluate: {uses: evaluate, inputs: {models: [pretrain, import]}}\n"
    )
    known = known_calls(load_spec(tmp_path / "p.yaml").cells)["evaluate"]
    with only_calls(known):
        for stage in load_spec(tmp_path / "p.yaml").cells[:2]:
            params: Any = stage.params
            refer(params, "model").load(params.model_args)
            refer(params, "dataset").load(DataSource.from_params(params).args)


# -------------------------------------------------------------------------- our own sources

_DANGEROUS = {"eval", "exec", "compile", "__import__"}
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# CIFAR's python version is a pickle; its reader builds arrays and nothing else (see test_data).
_ALLOWED = {("stages/data/cifar.py", "pickle")}


def test_no_source_reads_pickles_or_runs_text() -> None:
    found = set()
    for package in ("fishleg", "stages", "pipeline", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found |= {(name, what) for what in _dangers(node)}
    assert found == _ALLOWED


def _dangers(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in _MODULES]
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module in _MODULES else []
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    if called in _DANGEROUS or called in {"os.system", "os.popen"}:
        return [called]
    loads = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load"}
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in loads or options.get("allow_pickle") == "True" or options.get("shell") == "True":
        return [called]
    return []
