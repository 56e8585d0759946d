"""The images of a split that a model classifies correctly: one bit an image, packed as text.

10,000 images take 1,250 bytes, 1,668 characters of base64: a row of results holds them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack(right: NDArray[np.bool_]) -> str:
    """Return flags, (N,) bool, as base64 of their bits, the first one the highest of its byte.

    >>> pack(np.array([True, False, True]))
    'oA=='
    """
    return base64.b64encode(np.packbits(right).tobytes()).decode("ascii")


def unpack(text: str, count: int) -> NDArray[np.bool_]:
    """Return the flags, (count,) bool, that `pack` packed.

    Raises:
        ValueError: the text is no base64, or has another number of flags.

    >>> unpack("oA==", 3).tolist()
    [True, False, True]
    """
    content = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(content) != -(-count // 8):
        raise ValueError(
            f"expected {count:,} flags in {-(-count // 8):,} bytes, got {len(content):,}."
        )
    return np.unpackbits(content, count=count).astype(np.bool_)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of one model: what a comparison with another model needs.

    Attributes:
        accuracy: in percent.
        images: their number, or None if the row does not tell.
        digest: of the images and their labels, or None.
        right: the packed flags, or None.
        seed: of the model.
    """

    accuracy: float
    images: int | None = None
    digest: str | None = None
    right: str | None = None
    seed: int | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Answers:
        """Return the answers in a row of results, also in one of an earlier version."""
        return cls(
            accuracy=row["accuracy"],
            images=row.get("images"),
            digest=row.get("images_digest"),
            right=row.get("right"),
            seed=row.get("seed"),
        )

    def flags(self) -> NDArray[np.bool_] | None:
        """Return the flags, (images,) bool, or None if the row has none."""
        if self.right is None or self.images is None or self.digest is None:
            return None
        return unpack(self.right, self.images)
