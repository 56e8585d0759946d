"""Makes an MLflow model of a stored result, as a `torch.export` program (pt2).

Such a program is no pickle and needs nothing of this project where it is loaded. Making one imports
torch and the code behind the model, so it is done in a process of its own: the driver stays light.
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
        calls: what it may import and call by what the source says, see `pipeline.stage.call_text`.
        source: folder of the output that holds the model.
        destination: folder to make.

    Raises:
        PipelineError: it cannot be loaded, or not be exported.
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

    import mlflow.pytorch  # takes seconds, so a model that cannot be loaded comes first

    torch = sys.modules["torch"]
    mlflow.pytorch.save_model(
        model.eval(),
        destination,
        input_example=example,
        serialization_format="pt2",
        # Given, because MLflow would find out by loading the model in yet another process.
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
