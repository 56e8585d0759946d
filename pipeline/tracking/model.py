"""Exports a stored result as an MLflow model: a `torch.export` program (pt2).

Such a program is no pickle, and loads without this project. The export imports torch and the
model's code, so it runs in a process of its own, which keeps the driver light.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.base.errors import PipelineError
from pipeline.base.search_path import python_command, search_variable
from pipeline.stage import only_calls

_LIMIT_S = 600.0
_SHOWN_CHARACTERS = 2000


def pack(loader: str, calls: Sequence[str], source: Path, destination: Path) -> None:
    """Write the model in `source` as an MLflow model folder.

    Args:
        loader: see `pipeline.stage.Catalogue`.
        calls: what the files in `source` may have it import and call, see `call_text`.
        source: folder of the output that holds the model.
        destination: folder to make.

    Raises:
        PipelineError: the model cannot be loaded or exported.
    """
    command = python_command(__name__, loader, str(source), str(destination))
    given = {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **search_variable(), **given}
    try:
        subprocess.run(  # noqa: S603 - our own interpreter and module
            command,
            input=json.dumps(list(calls)),
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().rpartition("\n")[2][:_SHOWN_CHARACTERS]
        raise PipelineError(f"the model cannot be exported for the registry: {said}") from None
    except subprocess.TimeoutExpired:
        raise PipelineError(f"exporting the model takes more than {_LIMIT_S:g} s.") from None


def _main(loader: str, source: str, destination: str) -> None:
    module, _, attribute = loader.partition(":")
    with only_calls(json.load(sys.stdin)):
        model, example = getattr(importlib.import_module(module), attribute)(Path(source))

    import mlflow.pytorch  # takes seconds, so it comes after the loading

    torch = sys.modules["torch"]
    mlflow.pytorch.save_model(
        model.eval(),
        destination,
        input_example=example,
        serialization_format="pt2",
        # MLflow would load the model in another process to infer these.
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
