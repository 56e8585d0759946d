"""Forecasts of the memory and the disk that a stage needs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.stage import Estimate, Params
from stages.catalogue.parameters.curvature import CurvatureParams
from stages.catalogue.parameters.data import DataParams, ImportParams, ModelParams
from stages.catalogue.parameters.training import TrainingParams
from stages.catalogue.registries import DATASETS, MODELS

_FLOAT_BYTES = 4
_PROCESS_BYTES = 500 * 2**20  # Python with torch


def _parameters(params: Sequence[Params]) -> int | None:
    """Return the size of the network that the nearest of `params` names, if known."""
    named = next((one for one in params if isinstance(one, ModelParams)), None)
    entry = MODELS.find(named.model) if named is not None else None
    if named is None or entry is None or "parameters" not in entry.sizes:
        return None
    width = named.model_args.get("width", entry.sizes.get("width", 1))
    return int(entry.sizes["parameters"] * (width / entry.sizes.get("width", 1)) ** 2)


def _data_bytes(params: Sequence[Params]) -> int:
    """Return the size of the decoded data, or 0 if unknown."""
    named = next((one for one in params if isinstance(one, DataParams)), None)
    entry = DATASETS.find(named.dataset) if named is not None else None
    return 0 if entry is None else entry.sizes.get("bytes", 0)


def estimate_import(params: ImportParams, upstream: Sequence[Params]) -> Estimate:
    """Forecast `import_checkpoint`: the data and the network, once each."""
    del upstream
    parameters = _parameters([params])
    if parameters is None:
        return Estimate()
    disk = parameters * _FLOAT_BYTES
    return Estimate(memory_bytes=_PROCESS_BYTES + _data_bytes([params]) + disk, disk_bytes=disk)


def estimate_training(params: TrainingParams, upstream: Sequence[Params]) -> Estimate:
    """Forecast a training: weights, gradients and moments; two checkpoints and the result.

    The factors of FishLeg depend on the shapes of the layers, which are not known here.
    """
    lineage = [params, *upstream]
    parameters = _parameters(lineage)
    if parameters is None or params.optimizer == "fishleg":
        return Estimate()
    moments = 2 if params.optimizer == "adamw" else 1
    state = parameters * _FLOAT_BYTES * (2 + moments)
    return Estimate(
        memory_bytes=_PROCESS_BYTES + 2 * _data_bytes(lineage) + state,
        disk_bytes=parameters * _FLOAT_BYTES * (1 + 2 * (1 + moments)),
    )


def estimate_curvature(params: CurvatureParams, upstream: Sequence[Params]) -> Estimate:
    """Forecast `curvature`: the estimate itself, and the gradients that are held for it.

    Factors are left out: they depend on the shapes of the layers, which are not known here.
    """
    parameters = _parameters(upstream)
    if parameters is None:
        return Estimate()
    vector = parameters * _FLOAT_BYTES
    memory = _PROCESS_BYTES + _data_bytes(upstream) + vector
    if params.method == "obs":
        return Estimate(
            memory_bytes=memory + 2 * vector * params.obs.block_size,
            disk_bytes=vector * params.obs.block_size,
        )
    if params.method == "mfac":
        count = min(params.mfac.gradients, params.samples * params.draws)
        return Estimate(memory_bytes=memory + vector * count, disk_bytes=vector * count)
    if params.method in {"eigen", "fishleg"}:
        own = params.eigen if params.method == "eigen" else params.fishleg
        held = min(own.memory_bytes, vector * params.samples * params.draws)
        return Estimate(memory_bytes=memory + held)
    if params.method == "fls":
        return Estimate(memory_bytes=memory + vector * params.fls.batch * params.draws)
    if params.method in {"diagonal", "magnitude"}:
        return Estimate(memory_bytes=memory + vector, disk_bytes=vector)
    return Estimate()
