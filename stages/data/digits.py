"""The 1,797 handwritten digits that ship with scikit-learn: 8x8 pixels, 17 grey levels, 10 classes.

E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

from pathlib import Path

import torch

from stages.data.dataset import DataSet, Split

_TURNS = 5
_LEVELS = 16


def load(root: Path, *, download: bool = False) -> DataSet:
    """Return the digits in a fixed split, equal in every class: about 60/20/20 %.

    In each class, counted in the file's order, digit number i goes to test when i mod 5 = 4, to
    validation when i mod 5 = 3, and else to training. No file is read from `root`.
    """
    del root, download  # they come with scikit-learn
    from sklearn.datasets import load_digits  # lazily: a second of import that few stages need

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    turn = torch.empty_like(labels)
    for label in range(10):
        where = labels == label
        turn[where] = torch.arange(int(where.sum())) % _TURNS
    everything = Split(inputs=images, labels=labels)
    return DataSet(
        train=everything.take((turn < 3).nonzero().flatten()),
        validation=everything.take((turn == 3).nonzero().flatten()),
        test=everything.take((turn == 4).nonzero().flatten()),
        num_classes=10,
        mean=(0.305,),
        std=(0.376,),
        scale=1 / _LEVELS,
        crop_padding=1,
    )
