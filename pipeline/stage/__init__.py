"""The part of the runner that stages may use: declarations, and the context of a running stage.

A plugin has a light catalogue module (pydantic and the standard library only) that declares its
stages; each names an entry point `module:function`, imported in a worker only. The function takes
one `Context` and returns nothing: it reads inputs from folders, writes outputs to folders, and
reports metrics, progress and records through the context. This package imports no ray, mlflow,
torch or yaml, so a stage also runs in a plain process, and in a test.
"""

from pipeline.base.rows import csv_text
from pipeline.stage.calls import call_text, only_calls, require_call
from pipeline.stage.context import Artifact, Context, EventSink, Preemption, write_json
from pipeline.stage.declaration import (
    Catalogue,
    Entry,
    Estimate,
    ExternalFile,
    Input,
    Notes,
    Output,
    Params,
    Registry,
    Resources,
    Results,
    Stage,
)
from pipeline.stage.errors import Preempted, StageError

__all__ = [
    # declarations
    "Catalogue",
    "Entry",
    "Estimate",
    "ExternalFile",
    "Input",
    "Notes",
    "Output",
    "Params",
    "Registry",
    "Resources",
    "Results",
    "Stage",
    # the context of a running stage
    "Artifact",
    "Context",
    "EventSink",
    "Preempted",
    "Preemption",
    "StageError",
    "csv_text",
    "write_json",
    # functions that stored files name
    "call_text",
    "only_calls",
    "require_call",
]
