"""Folders of images: ROOT/CLASS/image, or ROOT/train/CLASS/image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vbdcompress.data.raw import RawImages, RawSet
from vbdcompress.errors import DataError

MAX_FOLDER_BYTES = 8 * 2**30
# A fully bright pixel of 16 bits, and what makes it 255
BRIGHTEST_16, OF_16_TO_8 = 65535, 257


def read_folder(path: Path, image_size: int | None) -> RawSet:
    """ROOT/train/CLASS/image and ROOT/test (or val), or just ROOT/CLASS/image with no test part."""
    parts = [part for part in ("test", "val") if (path / part).is_dir()]
    if not (path / "train").is_dir():
        if parts:
            raise DataError(f"data set '{path}'", f"has a folder '{parts[0]}' but no 'train'.")
        train, classes = _read_image_folder(path, image_size)
        return RawSet(train, None, classes)
    train, classes = _read_image_folder(path / "train", image_size)
    if not parts:
        return RawSet(train, None, classes)
    test, test_classes = _read_image_folder(path / parts[0], image_size)
    if test_classes != classes:
        raise DataError(f"data set '{path}'", f"train has classes {classes}, {parts[0]} has {test_classes}.")
    return RawSet(train, test, classes)


def _read_image_folder(path: Path, image_size: int | None) -> tuple[RawImages, tuple[str, ...]]:
    from torchvision import datasets
    from torchvision.transforms import v2

    where = f"data set '{path}'"
    steps: list[Any] = [v2.ToImage()]
    if image_size is not None:
        steps += [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
    try:
        folder = datasets.ImageFolder(str(path), transform=v2.Compose(steps), loader=_read_image)
        first = folder[0][0]
        if first.numel() * len(folder) > MAX_FOLDER_BYTES:
            raise DataError(
                where,
                f"{len(folder)} images of {tuple(first.shape)} are more than {MAX_FOLDER_BYTES >> 30} GiB.",
                "Use compress(model, loader) with a loader that reads them as it goes.",
            )
        images = torch.stack([folder[item][0].as_subclass(Tensor) for item in range(len(folder))])
    except (OSError, RuntimeError) as error:
        raise DataError(
            where,
            f"can't be read as a folder of class folders: {error}",
            "Images of one size: --image-size N",
        ) from error
    labels = torch.tensor(folder.targets, dtype=torch.int64)
    return RawImages(images, labels, 255.0), tuple(folder.classes)


def _read_image(path: str) -> Image.Image:
    """In RGB of 8 bits; Pillow alone would clip 16 bits, and floats from 0 to 1, to white and to black."""
    with Image.open(path) as image:
        if image.mode == "F":
            raise DataError(f"file '{path}'", "holds floats; allowed are 8 or 16 bits for each channel.")
        if not image.mode.startswith("I"):
            return image.convert("RGB")
        values = np.asarray(image)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > BRIGHTEST_16:
        raise DataError(
            f"file '{path}'", f"holds values from {lowest} to {highest}, allowed are 0 to {BRIGHTEST_16}."
        )
    return Image.fromarray((values / OF_16_TO_8).round().astype(np.uint8)).convert("RGB")
