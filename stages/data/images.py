"""One image file as three channels of bytes: each kind of pixel is read by its range, or refused.

Palettes, grey levels, one bit, CMYK and YCbCr become RGB as in Pillow. 16-bit grey levels are
divided by 257, so that black is 0 and white 255. Refused, by path: pixels without a range
(floating-point numbers, 32-bit integers), several frames, damaged files, and transparent pixels
unless a background is given, since no viewer shows the colour under them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.stage import StageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm"}
RULES = 2  # raise it when any image decodes to other bytes, so that decoded copies are not mixed
_AS_PILLOW_DOES = {"RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV"}
_WITH_ALPHA = {"RGBA", "LA", "PA"}
_16_BITS = {"I;16", "I;16L", "I;16B", "I;16N"}
_ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> the `PIL.Image.Transpose` that makes it upright; all other values are upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_TRANSPARENT = (
    "{} has transparent pixels, and no background. Give a grey level: "
    "`dataset_args: {{background: 255}}` is white, 0 is black."
)
# Errors of Pillow for bytes that are no whole image.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options of reading images.

    Attributes:
        image_size: shorter side after resizing, then a centre crop to a square; None to keep sizes.
        background: grey level, 0 to 255, behind transparent pixels; None to refuse such images.
        upright: turn photographs by their EXIF orientation; else they stay as stored.

    Raises:
        StageError: a value is out of range.
    """

    image_size: int | None = None
    background: int | None = None
    upright: bool = False

    def __post_init__(self) -> None:
        side, grey = self.image_size, self.background
        if side is not None and not (type(side) is int and side >= 1):
            raise StageError(f"image_size: expected a number of pixels, at least 1, got {side!r}.")
        if grey is not None and not (type(grey) is int and 0 <= grey <= 255):
            raise StageError(f"background: expected a grey level from 0 to 255, got {grey!r}.")
        if type(self.upright) is not bool:
            raise StageError(f"upright: expected true or false, got {self.upright!r}.")


def read_image(path: Path, reading: Reading) -> tuple[Tensor, bool]:
    """Return the pixels, uint8 (3, H, W), and whether an EXIF orientation was ignored.

    Raises:
        StageError: the file is damaged or refused; see the module.
    """
    from PIL import Image, ImageOps  # lazily: only trees of images need it

    try:
        with Image.open(path) as file:
            file.verify()  # checksums, where the format has them; reading does not look at them
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            if frames > 1 and file.format != "MPO":  # its second picture is a preview of the first
                raise StageError(f"{path}: expected one image, got {frames} frames; keep one.")
            turn = _turn(file)
            image = _in_bytes(path, file, reading.background)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise StageError(
            f"{path}: expected a whole image, got {type(error).__name__}: {error}. Remove the "
            "file, or get it again."
        ) from None
    if turn is not None and reading.upright:
        image = image.transpose(Image.Transpose[turn])
    if reading.image_size is not None:
        side = (reading.image_size, reading.image_size)
        image = ImageOps.fit(image, side, Image.Resampling.BILINEAR)
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = raw.reshape(image.height, image.width, 3).permute(2, 0, 1)
    return pixels, turn is not None and not reading.upright


def _turn(image: Image) -> str | None:
    """Return the `Transpose` that turns the image upright, or None when it is."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except _BROKEN:  # damaged EXIF data beside whole pixels
        return None


def _in_bytes(path: Path, image: Image, background: int | None) -> Image:
    """Return the image in mode RGB.

    Raises:
        StageError: its pixels have no range, or some are transparent.
    """
    if image.mode in _16_BITS or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        if "transparency" in image.info:
            raise StageError(_TRANSPARENT.format(path))
        return _from_16_bits(path, image)
    if image.has_transparency_data and image.mode in _WITH_ALPHA | _AS_PILLOW_DOES:
        return _opaque(path, image, background)
    if image.mode not in _AS_PILLOW_DOES:
        raise StageError(
            f"{path}: pixels of kind {image.mode} have no range, so that white is not defined. "
            "Convert them to 8 or 16 bits, or write a loader of your own."
        )
    return image.convert("RGB")


def _from_16_bits(path: Path, image: Image) -> Image:
    """Divide by 257, rounded: 65535 is white, and widened bytes come back unchanged.

    Raises:
        StageError: there are numbers of more than 16 bits.
    """
    from PIL import Image as images

    wide = image.convert("I")  # 32 bits, in the machine's order
    levels = torch.frombuffer(bytearray(wide.tobytes()), dtype=torch.int32)
    if levels.numel() and (levels.min() < 0 or levels.max() > 2**16 - 1):
        raise StageError(
            f"{path}: expected grey levels from 0 to 65535, got {int(levels.min())} to "
            f"{int(levels.max())}."
        )
    narrow = ((levels + 128) // 257).to(torch.uint8)
    return images.frombytes("L", image.size, narrow.numpy().tobytes()).convert("RGB")


def _opaque(path: Path, image: Image, background: int | None) -> Image:
    """Put the background behind the image; an opaque image needs none.

    Raises:
        StageError: there is no background, and it needs one.
    """
    from PIL import Image as images

    layered = image.convert("RGBA")
    least, _ = layered.getchannel("A").getextrema()
    if least == 255:
        return layered.convert("RGB")
    if background is None:
        raise StageError(_TRANSPARENT.format(path))
    behind = images.new("RGBA", image.size, (background, background, background, 255))
    return images.alpha_composite(behind, layered).convert("RGB")
