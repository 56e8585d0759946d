"""The data set of a stage: its folder, verification, subset and normalisation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stage import StageError
from stages.data.checks import check
from stages.data.dataset import DataSet, digest_arrays, spread
from stages.data.place import data_folder
from stages.reference import Reference, refer, require_options

if TYPE_CHECKING:
    from stages.catalogue import DataParams


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set with its options, as it is kept beside each model for the stages that follow.

    Attributes:
        reference: the loader.
        args: options of the loader.
        download: whether the loader may fetch missing data.
        verify: whether the arrays must have the digest in `reference`.
        subset: samples kept of each split, or None for all.
        mean: replaces the data set's own normalisation, or None.
        std: likewise.
    """

    reference: Reference
    args: Mapping[str, Any] = field(default_factory=dict)
    download: bool = False
    verify: bool = True
    subset: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def from_params(cls, params: DataParams) -> DataSource:
        """Return the source that a stage's parameters describe."""
        return cls(
            reference=refer(params, "dataset"),
            args=dict(params.dataset_args),
            download=params.download,
            verify=params.verify,
            subset=params.subset,
            mean=None if params.mean is None else tuple(params.mean),
            std=None if params.std is None else tuple(params.std),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataSource:
        """Return the source that `to_json` described."""
        changed = {
            "reference": Reference(**value["reference"]),
            "mean": None if value["mean"] is None else tuple(value["mean"]),
            "std": None if value["std"] is None else tuple(value["std"]),
        }
        return cls(**{**value, **changed})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able description."""
        return asdict(self)


def load_data(source: DataSource) -> tuple[DataSet, DataSource]:
    """Return the data set, and the source with the digest of the loaded arrays.

    A declared digest is verified. Without a declared one, the source returned has the digest found,
    so that later stages notice changed data.

    Missing data, data of another digest, and data that `stages.data.checks` refuses are a
    StageError.
    """
    return _load(data_folder().absolute(), json.dumps(source.to_json(), sort_keys=True))


@lru_cache(maxsize=1)  # a warm worker runs many cells on the same data
def _load(root: Path, description: str) -> tuple[DataSet, DataSource]:
    source = DataSource.from_json(json.loads(description))
    loader = source.reference.load(source.args)
    options = {"download": source.download, **source.args}
    require_options(loader, source.reference, "dataset_args", (root,), options)
    dataset = loader(root, **options)
    if not isinstance(dataset, DataSet):
        raise StageError(
            f"{source.reference.target} returned {type(dataset).__name__}; expected a "
            "stages.data.dataset.DataSet."
        )
    dataset = replace(
        dataset,
        mean=dataset.mean if source.mean is None else source.mean,
        std=dataset.std if source.std is None else source.std,
    )
    check(dataset, source.reference.name)
    source = _verified(dataset, source)
    if source.subset is not None:
        count = source.subset
        dataset = dataset.map_splits(lambda split: spread(split, count))
    return dataset, source


def _verified(dataset: DataSet, source: DataSource) -> DataSource:
    """Return the source with its digest filled in, after comparing it with a declared one.

    Raises:
        StageError: they differ.
    """
    if not source.verify:
        return source
    declared, found = source.reference.digest, digest_arrays(dataset)
    if declared is not None and declared != found:
        raise StageError(
            f"The arrays of data set {source.reference.name!r} have the sha256 {found}, expected "
            f"{declared}: files are damaged, cut down or changed. Get them again, or accept them "
            "with `verify: false` among the params of the stage that names the data set."
        )
    return replace(source, reference=replace(source.reference, digest=found))
