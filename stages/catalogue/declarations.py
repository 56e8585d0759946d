"""All stage types: parameters, inputs, outputs, resources, entry point."""

from __future__ import annotations

from pipeline.stage import Catalogue, Input, Notes, Output, Resources, Results, Stage
from stages.catalogue.estimates import estimate_curvature, estimate_import, estimate_training
from stages.catalogue.parameters.curvature import CurvatureParams
from stages.catalogue.parameters.data import ImportParams
from stages.catalogue.parameters.evaluation import CompareParams, EvaluateParams, SelectParams
from stages.catalogue.parameters.pruning import (
    GradualParams,
    MultistepParams,
    OneshotParams,
    PickParams,
)
from stages.catalogue.parameters.training import FinetuneParams, PretrainParams
from stages.catalogue.registries import DATASETS, METHODS, MODELS
from stages.columns import BEFORE, COLUMNS, TABLE

_MODEL = Input(kind="model", summary="the model to work on")
_GIVES_MODEL = {"model": Output(kind="model", summary="weights, masks and facts")}

CATALOGUE = Catalogue(
    stages=[
        Stage(
            name="pretrain",
            entry="stages.pretrain:pretrain",
            params=PretrainParams,
            outputs=_GIVES_MODEL,
            estimate=estimate_training,
            parallel=True,
            summary="trains a network from scratch",
        ),
        Stage(
            name="import_checkpoint",
            entry="stages.import_checkpoint:import_checkpoint",
            params=ImportParams,
            outputs=_GIVES_MODEL,
            estimate=estimate_import,
            summary="takes a trained network from a safetensors file",
        ),
        Stage(
            name="curvature",
            entry="stages.curvature:curvature",
            params=CurvatureParams,
            inputs={"model": _MODEL},
            outputs={"curvature": Output(kind="curvature", summary="the fitted estimate")},
            estimate=estimate_curvature,
            parallel=True,
            summary="estimates the inverse Fisher of a model, with a certificate",
        ),
        Stage(
            name="prune_oneshot",
            entry="stages.prune_oneshot:prune_oneshot",
            params=OneshotParams,
            inputs={
                "model": _MODEL,
                "curvature": Input(kind="curvature", summary="estimated on that model"),
            },
            outputs=_GIVES_MODEL,
            summary="removes weights in one step, and moves the survivors",
        ),
        Stage(
            name="prune_multistep",
            entry="stages.prune_multistep:prune_multistep",
            params=MultistepParams,
            inputs={"model": _MODEL},
            outputs={
                **_GIVES_MODEL,
                "steps": Output(kind="steps", summary="the model after each step"),
            },
            summary="one-shot pruning in several steps, refined without labels",
        ),
        Stage(
            name="pick",
            entry="stages.pick:pick",
            params=PickParams,
            inputs={"steps": Input(kind="steps", summary="of a multi-step pruning")},
            outputs=_GIVES_MODEL,
            summary="selects the step of a sparsity, or the sparsest within a budget",
        ),
        Stage(
            name="prune_gradual",
            entry="stages.prune_gradual:prune_gradual",
            params=GradualParams,
            inputs={"model": _MODEL},
            outputs=_GIVES_MODEL,
            parallel=True,
            summary="removes weights in steps, with training and fresh curvature between",
        ),
        Stage(
            name="finetune",
            entry="stages.finetune:finetune",
            params=FinetuneParams,
            inputs={
                "model": _MODEL,
                "teacher": Input(
                    kind="model", optional=True, summary="dense model whose outputs are matched"
                ),
            },
            outputs=_GIVES_MODEL,
            estimate=estimate_training,
            parallel=True,
            summary="trains the surviving weights",
        ),
        Stage(
            name="select",
            entry="stages.select:select",
            params=SelectParams,
            inputs={
                "candidates": Input(kind="model", many=True, summary="models to choose from"),
                "dense": Input(
                    kind="model", optional=True, summary="the model that divergence is from"
                ),
            },
            outputs=_GIVES_MODEL,
            summary="selects the candidate that is best on the validation split",
        ),
        Stage(
            name="evaluate",
            entry="stages.evaluate:evaluate",
            params=EvaluateParams,
            inputs={"models": Input(kind="model", many=True, summary="any number of models")},
            outputs={"results": Output(kind="results", track=True, summary="one row a model")},
            summary="measures models, one row and one tracked run each",
        ),
        Stage(
            name="compare",
            entry="stages.compare:compare",
            params=CompareParams,
            inputs={"results": Input(kind="results", many=True, summary="rows to compare")},
            outputs={
                "report": Output(
                    kind="report", track=True, promote=True, summary="table.md, .csv, figure.png"
                )
            },
            resources=Resources(num_cpus=1),
            summary="makes the table and the figure",
        ),
    ],
    packages=("stages", "fishleg"),
    results=Results(
        kind="results",
        columns=TABLE,
        further=[column.name for column in COLUMNS if not column.in_tables],
        before=BEFORE,
        report="report",
    ),
    exporter="stages.exporter:export",
    exports="model",
    loader="stages.exporter:load",
    inspector="stages.inspection:inspect",
    inspects=["pretrain", "import_checkpoint"],
    notes=[Notes(kind="model", file="model.json", entry="stages.notes:notes")],
    registries=[MODELS, DATASETS, METHODS],
)
