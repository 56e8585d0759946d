"""The known accuracy of a dense network, compared with the measured one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.stage import StageError
from stages.data.dataset import DataSet

if TYPE_CHECKING:
    from stages.catalogue import ExpectationParams


def require_accuracy(
    params: ExpectationParams, found: float, split: str, dataset: DataSet, origin: str
) -> None:
    """Compare a dense network's accuracy with the one that the user expects, if any.

    Args:
        params: the expectation, and its margin.
        found: measured accuracy in percent.
        split: name of the split that was measured.
        dataset: the data that were measured, with their normalisation.
        origin: the file, or the cell, that the network comes from.

    Raises:
        StageError: they differ by more than the margin.
    """
    expected = params.expect_accuracy
    if expected is None or abs(found - expected) <= params.expect_margin:
        return
    raise StageError(
        f"expect_accuracy: found {found:.2f} % on the {len(dataset.split(split)):,} samples of the "
        f"{split} split, expected {expected:g} % within {params.expect_margin:g} (expect_margin). "
        "Likely causes: the network was trained with another normalisation than the one here, "
        f"{dataset.formula()} (set mean and std as in training); its classes are not the "
        f"{dataset.num_classes} here, or have another order; {origin} is another network; or "
        "model and model_args build another network with the same names."
    )
