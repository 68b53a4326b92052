"""Folders of images: ROOT/CLASS/image, or ROOT/train/CLASS/image."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vbdcompress.data.raw import RawImages, RawSet
from vbdcompress.errors import DataError
from vbdcompress.files import is_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What people call the parts of a data set, in lower case
PART_NAMES = (
    *("train", "training", "test", "testing", "dev", "eval", "evaluation"),
    *("val", "valid", "validation"),
)
MAX_FOLDER_BYTES = 8 * 2**30
# A fully bright pixel of 16 bits, and what makes it 255
BRIGHTEST_16, OF_16_TO_8 = 65535, 257


def read_folder(path: Path, image_size: int | None, apart: Path | None = None) -> RawSet:
    """ROOT/train/CLASS/image and ROOT/test (or val), or just ROOT/CLASS/image with no test part.

    Files and folders whose names begin with a dot are passed over. An empty class folder is a class.

    Args:
        image_size: see `read_source`.
        apart: folder of the validation data where there is one: it is no test part.
    """
    where = f"data set '{path}'"
    parts = [part for part in ("test", "val") if (path / part).is_dir()]
    if not (path / "train").is_dir():
        if parts:
            raise DataError(where, f"has a folder '{parts[0]}' but no 'train'.")
        names = _list_folders(path)
        if names and all(name.lower() in PART_NAMES for name in names):
            raise DataError(
                where, f"has the folders {', '.join(names)}; its parts must be called 'train' and 'test'."
            )
        train, classes = _read_classes(path, image_size)
        return RawSet(train, None, classes)
    train, classes = _read_classes(path / "train", image_size)
    notes = tuple(
        f"'{path / name}' was not read: validation examples are split off 'train', the test part is called "
        f"'test'. `run` and `evaluate` take it as validation data: --validation {path / name}"
        for name in _list_folders(path)
        if apart is None and name.lower() in PART_NAMES and name not in ("train", *parts[:1])
    )
    if not parts or (apart is not None and (path / parts[0]).resolve() == apart.resolve()):
        return RawSet(train, None, classes, notes)
    if parts[0] == "val":
        notes += (
            f"'{path / 'val'}' was taken for the test set: if anything was chosen on it, its error is too "
            f"low. As validation data: --validation {path / 'val'}",
        )
    test, test_classes = _read_classes(path / parts[0], image_size)
    if test_classes != classes:
        raise DataError(where, f"train has classes {classes}, {parts[0]} has {test_classes}.")
    return RawSet(train, test, classes, notes)


def _list_folders(path: Path) -> list[str]:
    names = sorted(item.name for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    for name in names:
        if not is_text(name):
            raise DataError(
                f"data set '{path}'", f"has a folder {name!a}, whose name is no UTF-8.", "Rename it."
            )
    return names


def _read_classes(path: Path, image_size: int | None) -> tuple[RawImages, tuple[str, ...]]:
    from torchvision.transforms import v2

    where = f"data set '{path}'"
    classes = _list_folders(path)
    files = [(file, label) for label, name in enumerate(classes) for file in _list_images(path / name)]
    if image_size is not None:
        _check_bytes(where, (3, image_size, image_size), len(files))
    if not files:
        held = f"{len(classes)} folders without images" if classes else "no folders"
        raise DataError(where, f"is no folder of class folders with images in them: it has {held}.")
    steps: list[Any] = [v2.ToImage()]
    if image_size is not None:
        steps += [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
    prepare = v2.Compose(steps)
    images: list[Tensor] = []
    for file, _ in files:
        images.append(prepare(_read_image(file)).as_subclass(Tensor))
        first, found = images[0].shape, images[-1].shape
        _check_bytes(where, first, len(files))
        if found != first:
            raise DataError(
                f"file '{file}'",
                f"is {found[1]} by {found[2]}, the first image of '{path}' is {first[1]} by {first[2]}.",
                "Images of one size: --image-size N",
            )
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return RawImages(torch.stack(images), labels, 255.0), tuple(classes)


def _check_bytes(where: str, shape: Sequence[int], count: int) -> None:
    if math.prod(shape) * count > MAX_FOLDER_BYTES:
        raise DataError(
            where,
            f"{count} images of {tuple(shape)} are more than {MAX_FOLDER_BYTES >> 30} GiB.",
            "Use compress(model, loader) with a loader that reads them as it goes.",
        )


def _list_images(folder: Path) -> list[Path]:
    """Of all depths, in torchvision's order: splits are drawn by position."""
    found, others, walked, seen = [], False, list[tuple[str, list[str]]](), set[str]()
    for root, inside, names in os.walk(folder, followlinks=True):
        inside.sort()
        if (place := os.path.realpath(root)) in seen:  # a link back, or to what was walked already
            inside.clear()
        else:
            seen.add(place)
            walked.append((root, names))
    for root, names in sorted(walked):
        inner = Path(root).relative_to(folder).parts
        for name in sorted(names):
            if any(part.startswith(".") for part in (*inner, name)):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                found.append(Path(root, name))
            others = True
    if others and not found:
        raise DataError(
            f"data set '{folder.parent}'",
            f"class '{folder.name}' has files, but none is an image by its name: "
            f"allowed are {', '.join(IMAGE_SUFFIXES)}.",
        )
    return found


def _read_image(path: Path) -> Image.Image:
    """In RGB of 8 bits; Pillow alone would clip 16 bits, and floats from 0 to 1, to white and to black."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise DataError(f"file '{path}'", "holds floats; allowed are 8 or 16 bits for each channel.")
            if not image.mode.startswith("I"):
                return image.convert("RGB")
            values = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # of PNGs Pillow's own
        raise DataError(f"file '{path}'", f"can't be read as an image: {error}") from error
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > BRIGHTEST_16:
        raise DataError(
            f"file '{path}'", f"holds values from {lowest} to {highest}, allowed are 0 to {BRIGHTEST_16}."
        )
    return Image.fromarray((values / OF_16_TO_8).round().astype(np.uint8)).convert("RGB")
