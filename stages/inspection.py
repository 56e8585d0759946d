"""The report of `fls inspect`: the prunable weights of a network, and why others are not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.stage import Registry
from stages.data.source import DataSource, load_data
from stages.model_folder import Facts
from stages.reference import refer

if TYPE_CHECKING:
    from stages.catalogue import ImportParams, PretrainParams

_WHAT = ("model", "model_args", "keep", "also_prune", "dataset", "dataset_args")


def inspect(cells: Mapping[str, PretrainParams | ImportParams]) -> list[dict[str, Any]]:
    """Build each distinct network once, and report its weights with two or more dimensions.

    Args:
        cells: name -> parameters, of the cells that train or import a network.

    Returns:
        For each network, as JSON: `cells`, `title`, `columns`, `rows` (a weight each) and `totals`.

    Cost: the memory of one network at a time; data are read where the catalogue does not have the
    number of their classes.
    """
    alike: dict[str, list[str]] = {}
    for name, params in cells.items():
        dumped = params.model_dump(mode="json")
        what = json.dumps({part: dumped[part] for part in _WHAT}, sort_keys=True)
        alike.setdefault(what, []).append(name)
    return [{"cells": names, **_look(cells[names[0]])} for names in alike.values()]


def _look(params: PretrainParams | ImportParams) -> dict[str, Any]:
    source = DataSource.from_params(params)
    facts = Facts(
        network=refer(params, "model"),
        network_args=params.model_args,
        num_classes=_classes(params) or load_data(source)[0].num_classes,
        data=source,
        keep=tuple(params.keep),
        also_prune=tuple(params.also_prune),
    )
    network = facts.build()
    partition = facts.partition(network)
    reasons = dict(partition.unprunable)
    prunable = {group.weight for group in partition.prunable}
    parameters = dict(network.named_parameters())
    rows = [
        {
            "weight": name,
            "shape": "x".join(str(size) for size in one.shape),
            "count": one.numel(),
            "prunable": "yes" if name in prunable else reasons[name],
        }
        for name, one in parameters.items()
        if name in prunable or name in reasons
    ]
    count = sum(one.numel() for one in parameters.values())
    removable = sum(parameters[name].numel() for name in prunable)
    return {
        "title": f"{facts.network.name} for {facts.num_classes} classes",
        "columns": ["weight", "shape", "count", "prunable"],
        "rows": rows,
        "totals": {
            "parameters": count,
            "prunable": removable,
            "fraction": removable / count if count else 0.0,
        },
    }


def _classes(params: PretrainParams | ImportParams) -> int | None:
    """Return the number of classes of the data, if the catalogue has it."""
    marks = type(params).model_fields["dataset"].metadata
    entries = [mark.find(params.dataset) for mark in marks if isinstance(mark, Registry)]
    return next((one.sizes.get("classes") for one in entries if one), None)
