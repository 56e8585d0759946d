"""CutMix: a rectangle of an image is taken from another, for targets without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.stage import StageError

_SIDES = (0.25, 0.75)  # of a rectangle, as fractions of the image's


def cutmix(images: Tensor, fraction: float, draw: torch.Generator) -> Tensor:
    """Return the images, some with a rectangle from another image of the batch in place of theirs.

    CutMix (Yun et al., arXiv 1905.04899) with other targets: there labels are mixed by area, here
    the target is the dense network's output for the mixed image. Height and width of a rectangle
    are uniform between a quarter and three quarters of the image's, and its place is uniform.

    Args:
        images: (n, C, H, W), on any device; not modified.
        fraction: probability that an image is changed, in [0, 1].
        draw: on the CPU; draws 5 n numbers and a permutation.

    Raises:
        StageError: these are no images.
    """
    if images.ndim != 4:
        raise StageError(
            f"cutmix: expected images (n, channels, height, width), got {tuple(images.shape)}; set "
            "refinement.cutmix to 0."
        )
    count, _, height, width = images.shape
    partner = torch.randperm(count, generator=draw).to(images.device)
    numbers = torch.rand(5, count, generator=draw).to(images.device)
    chosen = numbers[0] < fraction
    rows = _interval(numbers[1], numbers[2], height)
    columns = _interval(numbers[3], numbers[4], width)
    inside = chosen[:, None, None] & rows[:, :, None] & columns[:, None, :]
    return torch.where(inside.unsqueeze(1), images[partner], images)


def _interval(length: Tensor, place: Tensor, size: int) -> Tensor:
    """Return bool (n, size), True in an interval each, from uniform (n,) numbers in [0, 1)."""
    low, high = _SIDES
    lengths = ((low + (high - low) * length) * size).round().long()
    starts = (place * (size - lengths + 1)).long()
    positions = torch.arange(size, device=length.device)
    return (positions >= starts[:, None]) & (positions < (starts + lengths)[:, None])
