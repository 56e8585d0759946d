"""CutMix: what each image is made of."""

import pytest
import torch

from pipeline.stage import StageError
from stages.data.mixing import cutmix


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_image_has_one_rectangle_of_one_other() -> None:
    """Every pixel names its image and its place, so that nothing can have moved."""
    count, height, width = 200, 8, 12
    places = torch.arange(height * width).reshape(1, 1, height, width)
    images = torch.arange(count).reshape(-1, 1, 1, 1) * 1000 + places
    mixed = cutmix(images, 1.0, draw())
    assert torch.equal(mixed % 1000, images % 1000)
    origin = mixed.squeeze(1) // 1000
    sides = set()
    for number, image in enumerate(origin):
        others = (image != number).nonzero()
        if len(others) == 0:  # its own partner
            continue
        assert image[image != number].unique().numel() == 1
        top, left = others.min(0).values.tolist()
        bottom, right = (others.max(0).values + 1).tolist()
        assert (image[top:bottom, left:right] != number).all()
        assert len(others) == (bottom - top) * (right - left)
        sides.add((bottom - top, right - left))
    assert {side[0] for side in sides} == set(range(2, 7))
    assert {side[1] for side in sides} == set(range(3, 10))


def test_the_fraction_of_images_that_change() -> None:
    images = torch.randn(4000, 1, 8, 8, generator=draw(1))
    for fraction in (0.0, 0.3, 1.0):
        mixed = cutmix(images, fraction, draw())
        changed = (mixed != images).flatten(1).any(1).float().mean().item()
        assert changed == pytest.approx(fraction, abs=0.03)


def test_the_generator_fixes_the_mix_and_the_images_stay() -> None:
    images = torch.randn(20, 3, 8, 8, generator=draw(1))
    before = images.clone()
    assert torch.equal(cutmix(images, 0.5, draw(3)), cutmix(images, 0.5, draw(3)))
    assert not torch.equal(cutmix(images, 0.5, draw(3)), cutmix(images, 0.5, draw(4)))
    assert torch.equal(images, before)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(StageError, match=r"expected images .* got \(5, 7\)"):
        cutmix(torch.zeros(5, 7), 0.5, draw())
