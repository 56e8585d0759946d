"""Stage `import_checkpoint`: takes a trained network from a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from pipeline.stage import Context, StageError
from stages.data.source import DataSource, load_data
from stages.determinism import compute_deterministically
from stages.metrics import log_validation
from stages.model_folder import Facts, Model, save_model
from stages.tensor_files import load_into, load_tensors

if TYPE_CHECKING:
    from stages.catalogue import ImportParams


def import_checkpoint(ctx: Context) -> None:
    """Load the file into the network, look at its validation accuracy, and write output `model`."""
    params: ImportParams = ctx.params
    compute_deterministically(ctx.device)
    dataset, source = load_data(DataSource.from_params(params))
    facts = Facts.from_params(params, dataset, source)
    network = facts.build()
    load_weights(network, Path(params.path))
    network.to(ctx.device).eval()
    found = log_validation(ctx, network, dataset)
    model = Model(network=network, masks={}, facts=facts)
    dense = {"validation": found["accuracy"]}
    save_model(ctx.output("model"), model.with_facts(dense_accuracy=dense))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file whose names and shapes are the network's own.

    Raises:
        StageError: the file is not there, is no safetensors file, or does not fit the network.
    """
    try:
        tensors = load_tensors(path)
    except FileNotFoundError:
        raise StageError(f"{path.absolute()}: no such file; expected a checkpoint.") from None
    try:
        load_into(network, tensors)
    except RuntimeError as error:
        raise StageError(f"{path.absolute()} does not fit the network: {error}") from error
