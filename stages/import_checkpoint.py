"""Stage `import_checkpoint`: takes a trained network from a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fishleg.parameters import ParameterGroup, Partition
from fishleg.pruning import count_masks, weight_masks, zero_masks
from pipeline.stage import Context
from stages.data.source import DataSource, load_data
from stages.determinism import compute_deterministically
from stages.expectation import require_accuracy
from stages.metrics import accuracy_text, log_validation, measure, require_classifier
from stages.model_folder import Facts, Model, save_model
from stages.weights_file import load_weights

if TYPE_CHECKING:
    from stages.catalogue import ImportParams


def import_checkpoint(ctx: Context) -> None:
    """Load the file into the network, measure its accuracy, and write output `model`.

    Zeros in the file are a mask, unless `zeros` is free. The validation split is always measured;
    the test split where an accuracy on it is expected, since published accuracies are of test
    images, and no choice follows from it. An accuracy outside the expectation is a StageError.
    """
    params: ImportParams = ctx.params
    compute_deterministically(ctx.device)
    dataset, source = load_data(DataSource.from_params(params))
    facts = Facts.from_params("import_checkpoint", params, dataset, source)
    network = facts.build()
    loaded = load_weights(network, Path(params.path))
    for note in (*dataset.notes, *loaded.notes):
        ctx.say(note)
    network.to(ctx.device).eval()
    require_classifier(network, dataset)
    found = log_validation(ctx, network, dataset)
    accuracies = {"validation": found["accuracy"]}
    if params.expect_accuracy is not None and params.expect_split == "test":
        accuracies["test"] = measure(network, dataset, dataset.test)["accuracy"]
    ctx.say(f"accuracy as imported: {accuracy_text(accuracies)}")
    if params.expect_accuracy is not None:
        split = params.expect_split
        require_accuracy(
            params, accuracies[split], split, dataset, str(Path(params.path).absolute())
        )
    model = Model(network=network, masks={}, facts=facts).with_facts(dense_accuracy=accuracies)
    save_model(ctx.output("model"), _with_zeros(ctx, model, loaded.masks))


def _with_zeros(ctx: Context, model: Model, given: Mapping[str, Tensor]) -> Model:
    """Return the model with the zeros of its file as masks, and log their number.

    Args:
        ctx: its parameter `zeros` decides.
        model: the imported one, without masks.
        given: state-dict name -> masks that the file holds beside the weights.
    """
    params: ImportParams = ctx.params
    partition = model.facts.partition(model.network)
    masks = zero_masks(model.network, partition)
    masked = set(given)
    for group in partition.prunable:
        for name in masked.intersection(group.names):
            kept = given[name].to(masks[group.name].device)
            _survivors(group, masks).logical_and_(kept.reshape(group.rows, -1))
            masked.remove(name)
    if masked:
        names = ", ".join(sorted(masked))
        ctx.say(f"not prunable, so training does not keep their masks: {names}")
    removed, prunable = count_masks(partition, masks)
    if not removed:
        return model
    share = removed / prunable
    stay = "stay so" if params.zeros == "keep" else "may be trained again"
    ctx.say(
        f"zeros: {params.zeros}: {removed:,} of {prunable:,} prunable weights ({share:.2%}) are 0 "
        f"and {stay}: {_layers(partition, masks)}"
    )
    empty = [group.name for group in partition.prunable if not _survivors(group, masks).any()]
    if empty and params.zeros == "keep":
        ctx.say(
            f"zeros: {', '.join(empty)}: every weight is 0 and masked, so no training changes it; "
            "if the layer begins at 0 and was not pruned, set `zeros: free`"
        )
    imported = model.with_facts(method="imported", mode="imported")
    if params.zeros == "free":
        return imported
    return replace(imported.with_facts(target=share), masks=weight_masks(partition, masks))


def _layers(partition: Partition, masks: Mapping[str, Tensor]) -> str:
    """Return the removed weights of each layer, and all of its weights, as numbers."""
    found = []
    for group in partition.prunable:
        removed = int((~_survivors(group, masks)).sum())
        if removed:
            found.append(f"{group.name} {removed:,} of {group.rows * group.weight_columns:,}")
    return ", ".join(found)


def _survivors(group: ParameterGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """Return the mask of a group's weights, without the column of its bias."""
    return masks[group.name][:, : group.weight_columns]
