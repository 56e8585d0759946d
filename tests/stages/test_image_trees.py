"""Trees of images from outside: one list of classes, hidden files, and every kind of pixel."""

import errno
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.stage import StageError
from stages.data import image_folder, images
from stages.data.dataset import DataSet, digest_arrays
from stages.data.images import Reading, read_image


def save(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level, level, level)).save(path)
    return path


def tree(root: Path, classes: dict[str, str], count: int = 2) -> Path:
    """Write images of classes, split by split; the grey level of class "b" is ord("b")."""
    for split, names in classes.items():
        for name in names:
            for number in range(count):
                save(root / split / name / f"{number}.png", ord(name))
    return root


def load(root: Path, **options: Any) -> DataSet:
    return image_folder.load(".", root, **options)


def assert_labels_are_right(dataset: DataSet, classes: str) -> None:
    for name in ("train", "validation", "test"):
        split = dataset.split(name)
        shown = [chr(int(level)) for level in split.inputs[:, 0, 0, 0]]
        assert shown == [classes[label] for label in split.labels], name


# ------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("missing", ["a", "b", "c"])
def test_a_class_that_a_split_lacks_moves_no_label_and_is_told(
    tmp_path: Path, split: str, missing: str
) -> None:
    splits = {"train": "abc", "val": "abc", "test": "abc"}
    splits[split] = splits[split].replace(missing, "")
    dataset = load(tree(tmp_path, splits))
    assert dataset.num_classes == 3
    assert_labels_are_right(dataset, "abc")
    (note,) = dataset.notes
    assert f"{tmp_path / split} has no folder for '{missing}'" in note


def test_a_class_that_training_lacks_is_an_error_with_its_path(tmp_path: Path) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    save(tmp_path / "test" / "A" / "0.png")
    with pytest.raises(StageError, match=r"/test/A is no class: .*/train, whose folders"):
        load(tmp_path)


def test_a_misspelt_class_is_told_the_nearest_name(tmp_path: Path) -> None:
    save(tmp_path / "train" / "tortoise" / "0.png")
    save(tmp_path / "val" / "tortose" / "0.png")
    with pytest.raises(StageError, match=r"val/tortose is no class.*Did you mean 'tortoise'\?"):
        load(tmp_path)


def test_a_class_without_a_training_image_is_an_error_with_its_path(tmp_path: Path) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    (tmp_path / "train" / "logs").mkdir()
    with pytest.raises(StageError, match=r"train/logs has no image, but each folder"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", ".thumbnails"])
def test_hidden_folders_are_no_classes(tmp_path: Path, split: str, hidden: str) -> None:
    tree(tmp_path, {"train": "ab", "val": "ab", "test": "ab"})
    save(tmp_path / split / hidden / "0.png")
    save(tmp_path / split / "a" / hidden / "1.png")
    dataset = load(tmp_path)
    assert dataset.num_classes == 2
    assert len(dataset.split({"val": "validation"}.get(split, split))) == 4
    assert_labels_are_right(dataset, "ab")
    assert dataset.notes == ()


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    """macOS leaves both beside each file that it copies to a foreign disk."""
    tree(tmp_path, {"train": "ab", "test": "ab"})
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"\x00\x05\x16\x07 no image")
    (tmp_path / "train" / "a" / ".DS_Store").write_bytes(b"Bud1")
    (tmp_path / "test" / ".DS_Store").write_bytes(b"Bud1")
    dataset = load(tmp_path)
    assert len(dataset.train) + len(dataset.validation) == 4
    assert dataset.notes == ()


def test_files_that_are_left_out_are_told(tmp_path: Path) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    save(tmp_path / "train" / "stray.png")
    (tmp_path / "train" / "a" / "x.gif").write_bytes(b"GIF89a")
    (note,) = load(tmp_path).notes
    assert "train: 2 files are ignored" in note
    assert str(tmp_path / "train" / "stray.png") in note


def test_folders_that_are_no_split_are_told(tmp_path: Path) -> None:
    """The failing case: `validation` was passed over, training images set apart in its place."""
    tree(tmp_path, {"train": "ab", "validation": "ab", "test": "ab"})
    (note,) = load(tmp_path).notes
    assert "'validation': ignored, not train, val or test" in note


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_empty_split_is_an_error_with_its_path(tmp_path: Path, split: str) -> None:
    splits = {"train": "ab", "val": "ab", "test": "ab"}
    del splits[split]
    tree(tmp_path, splits)
    (tmp_path / split).mkdir()
    with pytest.raises(StageError, match=f"/{split} has no image"):
        load(tmp_path)


def test_a_tree_of_which_nothing_can_be_held_out_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"}, count=1)
    with pytest.raises(StageError, match="so that validation gets none"):
        load(tmp_path)


def test_a_link_to_nothing_is_an_error_with_its_path(tmp_path: Path) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    (tmp_path / "test" / "b" / "9.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(StageError, match=r"test/b/9.png is a link to a missing file"):
        load(tmp_path)


def test_links_to_folders_are_followed_and_those_around_themselves_are_not(tmp_path: Path) -> None:
    """The failing case: what lay behind a link was left out, in some versions of Python."""
    root = tree(tmp_path / "tree", {"train": "ab", "test": "ab"})
    save(tmp_path / "elsewhere" / "9.png", ord("a"))
    (root / "test" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "test" / "a" / "round").symlink_to(root / "test")
    dataset = load(root)
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1]
    assert_labels_are_right(dataset, "ab")


def test_a_tree_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path / "pets", {"train": "ab", "test": "ab"})
    assert image_folder.load("~/pets", Path("data")).num_classes == 2


def test_tiny_imagenet_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for number in range(2):
        save(root / "train" / "n01" / "images" / f"{number}.JPEG")
    save(root / "val" / "images" / "v0.JPEG")
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("v0.JPEG\tn01\t0\t0\n")
    assert image_folder.load_tiny_imagenet(tmp_path).test.labels.tolist() == [0]
    annotations.write_text("v0.JPEG\tn01\t0\t0\nv1.JPEG\tn01\t0\t0\n")
    with pytest.raises(StageError, match=r"val_annotations.txt:2: .*v1.JPEG is missing"):
        image_folder.load_tiny_imagenet(tmp_path)
    annotations.write_text("v0.JPEG\tn02\t0\t0\n")
    with pytest.raises(StageError, match=r"val_annotations.txt:1: 'n02' is no class folder"):
        image_folder.load_tiny_imagenet(tmp_path)


# ------------------------------------------------------------------------- kinds of pixel


def png(depth: int, colour: int, rows: bytes, *, chunk: bytes = b"", size: int = 1) -> bytes:
    """A PNG of one row, written by hand, since Pillow writes few of the kinds that it reads."""

    def part(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", size, 1, depth, colour, 0, 0, 0)
    extra = part(chunk[:4], chunk[4:]) if chunk else b""
    body = part(b"IDAT", zlib.compress(b"\0" + rows))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + extra + body + part(b"IEND", b"")


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
KINDS = {
    "16-bit grey": (png(16, GREY, struct.pack(">3H", 0, 257 * 100, 65535), size=3), [0, 100, 255]),
    "16-bit RGB": (png(16, RGB, struct.pack(">3H", 0, 257 * 100, 65535)), [[0, 100, 255]]),
    "16-bit grey and alpha": (png(16, GREY_ALPHA, struct.pack(">2H", 257 * 9, 65535)), [9]),
    "8-bit grey": (png(8, GREY, bytes([0, 7, 255]), size=3), [0, 7, 255]),
    "4-bit grey": (png(4, GREY, bytes([0x0F]), size=2), [0, 255]),
    "2-bit grey": (png(2, GREY, bytes([0b00011011]), size=4), [0, 85, 170, 255]),
    "1-bit grey": (png(1, GREY, bytes([0b10000000]), size=2), [255, 0]),
    "palette": (png(8, PALETTE, b"\1", chunk=b"PLTE\0\0\0\5\6\7"), [[5, 6, 7]]),
    "opaque alpha": (png(8, RGB_ALPHA, bytes([1, 2, 3, 255])), [[1, 2, 3]]),
    "opaque grey and alpha": (png(8, GREY_ALPHA, bytes([8, 255])), [8]),
    "16-bit graymap": (b"P5 2 1 65535\n" + struct.pack(">2H", 257, 65535), [1, 255]),
    "12-bit graymap": (b"P5 2 1 4095\n" + struct.pack(">2H", 0, 4095), [0, 255]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_pixel_is_converted_by_its_own_range(tmp_path: Path, kind: str) -> None:
    data, expected = KINDS[kind]
    (tmp_path / "x.png").write_bytes(data)
    pixels, _ = read_image(tmp_path / "x.png", Reading())
    wanted = [one if isinstance(one, list) else [one] * 3 for one in expected]
    assert pixels.dtype == torch.uint8
    assert pixels[:, 0].T.tolist() == wanted


def test_cmyk_photographs_are_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.jpg")
    pixels, _ = read_image(tmp_path / "x.jpg", Reading())
    assert pixels.unique().tolist() == [255]


def test_sixteen_bit_images_of_a_tree_are_not_all_white(tmp_path: Path) -> None:
    """The failing case: every value above 255 was cut to white."""
    for split in ("train", "test"):
        for name, level in (("dark", 1000), ("light", 60000)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                array = np.full((4, 4), level, np.uint16)
                Image.fromarray(array).save(folder / f"{number}.png")
    test = load(tmp_path).test
    assert test.inputs[:, 0, 0, 0].tolist() == [4, 4, 233, 233]


def transparent(kind: str, path: Path) -> Path:
    """A half transparent image: its left pixel shows what is behind, its right one is (9, 9, 9)."""
    image = Image.new("RGBA", (2, 1), (9, 9, 9, 255))
    image.putpixel((0, 0), (200, 200, 200, 0))
    if kind == "RGB":
        image = Image.new("RGB", (2, 1), (9, 9, 9))
        image.putpixel((0, 0), (200, 200, 200))
        image.save(path, transparency=(200, 200, 200))
    else:
        image.convert(kind).save(path)
    return path


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_need_a_background(tmp_path: Path, kind: str) -> None:
    path = transparent(kind, tmp_path / "x.png")
    with pytest.raises(StageError, match=r"x.png has transparent pixels.*background: 255"):
        read_image(path, Reading())
    for background in (0, 255):
        pixels, _ = read_image(path, Reading(background=background))
        assert pixels[:, 0].T.tolist() == [[background] * 3, [9] * 3]


@pytest.mark.parametrize(("mode", "form"), [("F", "TIFF"), ("I", "TIFF"), ("LAB", "TIFF")])
def test_pixels_without_a_range_are_refused_by_path(tmp_path: Path, mode: str, form: str) -> None:
    Image.new(mode, (2, 2)).save(tmp_path / "x.png", form)
    with pytest.raises(StageError, match=rf"x.png: pixels of kind {mode} have no range"):
        read_image(tmp_path / "x.png", Reading())


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [
        *((damage, suffix) for damage in ("cut", "empty", "text") for suffix in ("png", "jpg")),
        ("checksum", "png"),
    ],
)
def test_a_damaged_image_is_named(tmp_path: Path, damage: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    data = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"<html>404</html>",
        "checksum": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
    }
    path.write_bytes(data[damage])
    with pytest.raises(StageError, match=rf"x.{suffix}: expected a whole image, got"):
        read_image(path, Reading())


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_animation_is_refused_by_path(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    frames = [Image.new("RGB", (2, 2), (level, 0, 0)) for level in (0, 100, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(StageError, match=rf"x.{suffix}: expected one image, got 3 frames"):
        read_image(path, Reading())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_when_asked_and_else_noted(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.png"
    image.save(path, exif=exif)
    stored, left = read_image(path, Reading())
    assert stored.shape == (3, 2, 3)
    assert left == (orientation != 1)
    turned, left = read_image(path, Reading(upright=True))
    with Image.open(path) as file:
        expected = torch.from_numpy(np.array(ImageOps.exif_transpose(file)))
    assert torch.equal(turned.permute(1, 2, 0), expected)
    assert not left


def test_the_note_on_turned_photographs_outlives_the_cache(tmp_path: Path) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "train" / "a" / "1.png"
    Image.new("RGB", (4, 4)).save(path, exif=exif)
    first, again = load(tmp_path), load(tmp_path)
    assert first.notes == again.notes
    assert str(path) in first.notes[0]
    assert load(tmp_path, upright=True).notes == ()


# ---------------------------------------------------------------------------------- cache


def test_decoded_copies_do_not_outlive_the_rules_they_were_made_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    before = load(tmp_path)
    calls: list[Path] = []

    def watched(path: Path, reading: Reading) -> Any:
        calls.append(path)
        return read_image(path, reading)

    monkeypatch.setattr(image_folder, "read_image", watched)
    assert digest_arrays(load(tmp_path)) == digest_arrays(before)
    assert calls == []
    monkeypatch.setattr(image_folder, "RULES", images.RULES + 1)
    load(tmp_path)
    assert len(calls) == 8
    for options in ({"background": 0}, {"upright": True}, {"image_size": 2}):
        calls.clear()
        load(tmp_path, **options)
        assert len(calls) == 8, options


def decoded(tree: Path) -> Path:
    """Return the one file that a tree's decoded images are in."""
    (found,) = (path for path in tree.iterdir() if path.name.startswith(".decoded-"))
    return found


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "other", "no checksum", "folder"])
def test_a_damaged_cache_is_noticed_and_made_anew(tmp_path: Path, how: str) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    before = digest_arrays(load(tmp_path))
    cache = decoded(tmp_path)
    whole = cache.read_bytes()
    if how == "flipped":
        cache.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif how == "truncated":
        cache.write_bytes(whole[:-1])
    elif how == "empty":
        cache.write_bytes(b"")
    elif how == "folder":
        cache.unlink()
        cache.mkdir()
    else:
        images = {"train": torch.zeros(4, 3, 1, 1, dtype=torch.uint8)}
        about = {"notes": "[]", "sha256": "0" * 64} if how == "other" else {"notes": "[]"}
        save_file(images, cache, metadata={"about": json.dumps(about)})
    assert digest_arrays(load(tmp_path)) == before
    if how != "folder":
        assert cache.read_bytes() == whole


def test_a_cache_is_on_the_disk_before_it_has_its_name_and_processes_do_not_share_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    steps: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append(f"rename {self.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    load(tmp_path)
    decoded(tmp_path).unlink()
    load(tmp_path)
    parts = [step.partition(" ")[2] for step in steps if step.startswith("rename")]
    assert len(set(parts)) == 2
    for part, at in zip(parts, (0, 3), strict=True):
        assert steps[at : at + 3] == [f"sync {part}", f"rename {part}", f"sync {tmp_path.name}"]


def test_a_full_disk_leaves_a_tree_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        before = digest_arrays(load(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]
    assert digest_arrays(load(tmp_path)) == before


def test_a_renamed_class_is_decoded_again(tmp_path: Path) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    load(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "a").rename(tmp_path / split / "c")
    levels = load(tmp_path).test.inputs[:, 0, 0, 0].tolist()
    assert levels == [ord("b")] * 2 + [ord("a")] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size: expected a number of pixels, at least 1, got 0"),
        ({"background": 256}, "background: expected a grey level from 0 to 255, got 256"),
        ({"upright": "yes"}, "upright: expected true or false, got 'yes'"),
    ],
)
def test_options_out_of_range_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    tree(tmp_path, {"train": "ab", "test": "ab"})
    with pytest.raises(StageError, match=message):
        load(tmp_path, **options)
