"""A named data set, normalised and split: what the command line trains and measures on."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vbdcompress.data.batches import AT_ONCE, CROP_PADDING, Augment, TensorBatches, examples_at_once
from vbdcompress.data.raw import RawImages, RawSet
from vbdcompress.data.sources import NAMED_SETS, is_folder, read_source
from vbdcompress.data.split import check_apart, split_places
from vbdcompress.errors import ConfigError, DataError
from vbdcompress.records import InputSpec

# Further off in mean, counted in deviations, or in their deviation, images are of another scale
STRANGE_MEAN, STRANGE_STD = 4.0, (0.1, 3.0)
# By name: what other sets, of paths too, hold is not known to stay in its class
CROPPED_AND_FLIPPED = ("cifar10", "cifar100")
# Classes that a warning names
NAMED = 5
# Of pixels from 0 to 1; what is said of those up to 255 is above the last
DEVIATIONS, LARGEST_SCALE = (0.02, 0.5), 2.0


@dataclass(frozen=True)
class Examples:
    """Normalised inputs [n, ...] and labels [n]."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """A data set ready to train on.

    Attributes:
        name: as `load_data` was asked for it.
        input: shape, mean and std of the inputs.
        classes: names of the classes, in the order of the labels.
        train: training examples without the validation split.
        validation: held out of the training data.
        test: None where the set has no test part.
        notes: sentences that who measures on it must know.
    """

    name: str
    input: InputSpec
    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples | None
    notes: tuple[str, ...] = ()

    @property
    def recorded_name(self) -> str:
        """For files: a path without the folders of this machine, and never the name of a known set."""
        if self.name in NAMED_SETS:
            return self.name
        last = Path(os.path.abspath(self.name)).name  # of "." too; links keep their own names
        return f"./{last}" if last in NAMED_SETS else last

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        augment: Augment | Literal["auto"] = "none",
        pixels: int = CROP_PADDING,
    ) -> TensorBatches:
        """The training examples, shuffled; augment "auto" crops and flips CIFAR's, which keeps the label."""
        if augment == "auto":
            augment = "crop-flip" if self.name in CROPPED_AND_FLIPPED else "none"
        return TensorBatches(
            self.train.inputs,
            self.train.labels,
            batch_size,
            shuffle=True,
            augment=augment,
            pixels=pixels,
            seed=seed,
        )

    def validation_batches(self, batch_size: int | None = None) -> TensorBatches:
        """The validation examples in order; in batches of `examples_at_once` where nobody says more."""
        return _in_order(self.validation, batch_size)

    def test_batches(self, batch_size: int | None = None) -> TensorBatches | None:
        """The test examples likewise; None where there are none."""
        return None if self.test is None else _in_order(self.test, batch_size)


def _in_order(examples: Examples, batch_size: int | None) -> TensorBatches:
    return TensorBatches(examples.inputs, examples.labels, batch_size or examples_at_once(examples.inputs))


def load_data(
    name: str,
    root: Path | None = None,
    *,
    normalisation: InputSpec | None = None,
    validation_fraction: float = 0.1,
    validation_seed: int = 0,
    validation_path: str | None = None,
    image_size: int | None = None,
    classes: Sequence[str] = (),
) -> DataSet:
    """Read, check, normalise and split a data set.

    Args:
        name: "digits", a torchvision set, a folder of class folders, or an .npz file.
        root: where torchvision's sets lie or are downloaded to.
        normalisation: shape, mean and std that the network was trained with; without a mean, it and std are
            measured on the training images, for each channel, after scaling pixels to [0, 1].
        validation_fraction, validation_seed: the split of the training data.
        validation_path: a folder or .npz of validation data instead; then nothing is split off. A part of
            the data set's own folder is no test set then.
        image_size: that a folder's images are resized to; None takes what the network was trained on, where
            that is square.
        classes: of the network, by its outputs; empty where nobody says.
    Raises:
        ConfigError: an image size, and no folder.
        DataError: what is missing or malformed, or does not fit the network.
    """
    paths = [name] if validation_path is None else [name, validation_path]
    if image_size is not None and not any(map(is_folder, paths)):
        raise ConfigError(
            f"data set '{name}'", "is no folder: --image-size is for folders of images.", "Leave it out."
        )
    if validation_path is not None:
        check_apart(name, validation_path)
    trained = normalisation.shape if normalisation and is_folder(name) else ()
    apart = None if validation_path is None else Path(validation_path)
    raw, image_size = _read_sized(name, root, image_size, trained, apart)
    notes = _check_classes(name, raw.classes, classes) + raw.notes
    parts = {"training": raw.train} | ({"test": raw.test} if raw.test else {})
    if validation_path is not None:
        parts["validation"] = _read_validation(validation_path, root, image_size, raw.classes)
    shape = tuple(raw.train.images.shape[1:])
    for part, images in parts.items():
        _check_images(f"data set '{name}', {part} part", images, len(raw.classes), shape)
    if normalisation and normalisation.mean:
        spec = replace(normalisation, shape=shape)
        if len(spec.mean) == 1:  # the same for all channels
            spec = replace(spec, mean=spec.mean * shape[0], std=spec.std * shape[0])
        if len(spec.mean) == shape[0]:
            notes += tuple(note for part, images in parts.items() for note in _notes(part, images, spec))
    else:
        spec = _measure(raw.train)
    if len(spec.mean) != shape[0]:
        raise DataError(
            f"data set '{name}'",
            f"images have {shape[0]} channels, the network was trained with {len(spec.mean)}.",
        )
    train, held = raw.train, parts.get("validation")
    if held is None:  # as bytes: floats are four times as many
        train, held = _split(raw.train, validation_fraction, validation_seed)
    test = _normalise(raw.test, spec) if raw.test else None
    return DataSet(name, spec, raw.classes, _normalise(train, spec), _normalise(held, spec), test, notes)


def _read_sized(
    name: str, root: Path | None, image_size: int | None, trained: tuple[int, ...], apart: Path | None
) -> tuple[RawSet, int | None]:
    """Images of the size that was asked for, else of the one trained on; and what they were resized to."""
    if image_size is not None or len(trained) != 3:
        return read_source(name, root, image_size, apart), image_size
    if trained[1] == trained[2]:
        image_size = trained[2]
    raw = read_source(name, root, image_size, apart)
    found = tuple(raw.train.images.shape[2:])
    if found != trained[1:]:
        raise DataError(
            f"data set '{name}'",
            f"images are {found[0]} by {found[1]}, the network was trained on {trained[1]} by {trained[2]}.",
            "Resize the files, or say --image-size N.",
        )
    return raw, image_size


def _check_classes(name: str, found: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Labels are positions among the classes: one that the network knows must stand where it does there.

    Returns:
        a warning where some have names that the network does not know.
    """
    for names in (found, known):
        if list(names) == [str(number) for number in range(len(names))]:  # made up, or none at all
            return ()
    moved = [each for each in found if each in known and found.index(each) != known.index(each)]
    if moved:
        raise DataError(
            f"data set '{name}'",
            f"has class '{moved[0]}' as number {found.index(moved[0])}, for the network it is number "
            f"{known.index(moved[0])}.",
            f"The network's classes, in order: {', '.join(known)}; empty folders count.",
        )
    strange = [f"'{each}' (number {number})" for number, each in enumerate(found) if each not in known]
    if not strange:
        return ()
    told = ", ".join(strange[:NAMED]) + (" and others" if strange[NAMED:] else "")
    return (
        f"The network knows no class {told}; its own are, in order, {', '.join(known)}. "
        "Unless they are other names for these, every error here is wrong.",
    )


def _notes(part: str, raw: RawImages, told: InputSpec) -> tuple[str, ...]:
    """A warning where a part's images are of another scale than those that the network was trained on."""
    if any(std < DEVIATIONS[0] or DEVIATIONS[1] < std <= LARGEST_SCALE for std in told.std):
        return ()  # a scale (1 for pixels as they are, 1/255 for bytes), not how far the images vary
    some = raw.images[:: max(1, len(raw.images) // AT_ONCE)]
    found = _measure(replace(raw, images=some))
    strange = any(
        abs(mean - usual) > STRANGE_MEAN * width or not STRANGE_STD[0] * width < std < STRANGE_STD[1] * width
        for mean, std, usual, width in zip(found.mean, found.std, told.mean, told.std, strict=True)
    )
    if not strange:
        return ()
    mean, std = ([round(value, 4) for value in values] for values in (found.mean, found.std))
    return (
        f"The {part} images have mean {mean} and deviation {std}, where the network was trained with "
        f"{list(told.mean)} and {list(told.std)}: if they are of another scale or kind, every error here is "
        "wrong.",
    )


def _read_validation(
    path: str, root: Path | None, image_size: int | None, classes: tuple[str, ...]
) -> RawImages:
    held = read_source(path, root, image_size)
    # Labels are positions among the classes: the same class must stand at the same one
    if held.classes != classes[: len(held.classes)]:
        raise DataError(f"validation set '{path}'", f"has classes {held.classes}, training has {classes}.")
    return held.train


def _check_images(where: str, raw: RawImages, classes: int, shape: tuple[int, ...]) -> None:
    if len(raw.labels) == 0:
        raise DataError(where, "is empty.")
    found = tuple(raw.images.shape[1:])
    if found != shape:
        raise DataError(where, f"images are {found}, the training part's are {shape}.")
    if raw.images.is_floating_point() and not bool(raw.images.isfinite().all()):
        bad = int((~raw.images.isfinite().flatten(1).all(1)).sum())
        raise DataError(where, f"{bad} of {len(raw.images)} images hold NaN or infinity.")
    lowest, highest = int(raw.labels.min()), int(raw.labels.max())
    if lowest < 0 or highest >= classes:
        raise DataError(where, f"labels run from {lowest} to {highest}; allowed are 0 to {classes - 1}.")


def _measure(raw: RawImages) -> InputSpec:
    shape = tuple(raw.images.shape[1:])
    count = raw.images.numel() / shape[0]

    def mean_of(values: Callable[[Tensor], Tensor]) -> Tensor:
        # in parts: all pixels in float64 at once are eight times the images
        parts = [
            values(images.transpose(0, 1).flatten(1).double() / raw.scale).sum(1)
            for images in torch.split(raw.images, examples_at_once(raw.images))
        ]
        return torch.stack(parts).sum(0) / count

    mean = mean_of(lambda pixels: pixels)
    std = mean_of(lambda pixels: (pixels - mean[:, None]).square()).sqrt()
    # a channel that is the same everywhere is only shifted
    return InputSpec(shape, _rounded(mean), tuple(value or 1.0 for value in _rounded(std)))


def _rounded(values: Tensor) -> tuple[float, ...]:
    """To four decimals, or four digits where that is more: deviations may be small."""
    return tuple(round(value, 4) if abs(value) >= 0.1 else float(f"{value:.4g}") for value in values.tolist())


def _normalise(raw: RawImages, spec: InputSpec) -> Examples:
    mean = torch.tensor(spec.mean)[:, None, None]
    std = torch.tensor(spec.std)[:, None, None]
    # in place, on a copy: large sets fill the memory
    inputs = raw.images.to(torch.float32, copy=True)
    return Examples(inputs.div_(raw.scale).sub_(mean).div_(std), raw.labels)


def _split(raw: RawImages, fraction: float, seed: int) -> tuple[RawImages, RawImages]:
    places = split_places(len(raw.labels), fraction, seed)
    train, held = (replace(raw, images=raw.images[part], labels=raw.labels[part]) for part in places)
    return train, held
