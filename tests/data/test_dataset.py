"""Normalising and splitting, against sums by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vbdcompress.data import DataSet, load_data
from vbdcompress.errors import DataError
from vbdcompress.records import InputSpec


def write_npz(path: Path, count: int = 20, size: int = 4, **arrays: np.ndarray) -> str:
    """A set of `count` random grey images; further arrays replace or join its own."""
    generator = np.random.default_rng(0)
    content = {
        "images": generator.integers(0, 256, (count, size, size), dtype=np.uint8),
        "labels": np.arange(count) % 3,
    }
    np.savez(path, **(content | arrays))
    return str(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_load_data_measures_mean_and_std_of_each_channel(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(1).integers(0, 200, (50, channels, 5, 6), dtype=np.uint8)
    found = load_data(write_npz(tmp_path / "set.npz", images=images, labels=np.arange(50) % 4))
    pixels = images.astype(np.float64) / 255
    assert found.input.shape == (channels, 5, 6)
    assert found.input.mean == pytest.approx(pixels.mean((0, 2, 3)), abs=6e-5)
    assert found.input.std == pytest.approx(pixels.std((0, 2, 3)), abs=2e-4)


def test_load_data_normalises_with_the_networks_mean_and_std(tmp_path: Path) -> None:
    images = np.full((10, 3, 2, 2), 51, np.uint8)  # 0.2 of a bright pixel
    path = write_npz(tmp_path / "set.npz", images=images, labels=np.arange(10) % 2)
    given = InputSpec((3, 2, 2), (0.1, 0.2, 0.4), (0.5, 1.0, 0.1), "pixels")
    found = load_data(path, normalisation=given)
    assert found.input == given
    expected = torch.tensor([0.2, 0.0, -2.0]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(found.train.inputs[0], expected, rtol=1e-5, atol=1e-6)


def test_load_data_states_the_shape_of_what_it_read(tmp_path: Path) -> None:
    given = InputSpec((1, 9, 9), (0.5,), (0.5,))
    found = load_data(write_npz(tmp_path / "set.npz"), normalisation=given)
    assert found.input == InputSpec((1, 4, 4), (0.5,), (0.5,))


def test_load_data_refuses_other_channels_than_the_networks(tmp_path: Path) -> None:
    given = InputSpec((3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(DataError, match="1 channels, the network was trained with 3"):
        load_data(write_npz(tmp_path / "set.npz"), normalisation=given)


@pytest.mark.parametrize(
    ("images", "warned"),
    [
        (lambda pixels: pixels, False),
        (lambda pixels: (pixels / 255).astype(np.float32), False),
        (lambda pixels: pixels // 2 + 40, False),
        (lambda pixels: ((pixels / 255 - 0.5) / 0.28).astype(np.float32), True),
    ],
)
def test_load_data_notes_images_of_another_scale(tmp_path: Path, images: Any, warned: bool) -> None:
    told = load_data(write_npz(tmp_path / "set.npz")).input
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    path = write_npz(tmp_path / "other.npz", images=images(pixels))
    assert [note[:10] for note in load_data(path, normalisation=told).notes] == ["The traini"] * warned
    held = load_data(tmp_path.joinpath("set.npz").as_posix(), normalisation=told, validation_path=path)
    assert [note[:10] for note in held.notes] == ["The valida"] * warned


def test_load_data_notes_a_normalisation_of_bytes_for_pixels_up_to_1(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    of_bytes = InputSpec((1, 4, 4), (127.0,), (74.0,))
    (note,) = load_data(write_npz(tmp_path / "set.npz", images=pixels), normalisation=of_bytes).notes
    assert "[127.0] and [74.0]" in note


def test_load_data_takes_a_normalisation_that_is_a_scale_alone(tmp_path: Path) -> None:
    dark = write_npz(
        tmp_path / "set.npz", images=np.random.default_rng(0).integers(0, 20, (20, 4, 4), np.uint8)
    )
    for std in (1.0, 1 / 255):
        assert load_data(dark, normalisation=InputSpec((1, 4, 4), (0.0,), (std,))).notes == ()


def write_folder(root: Path, names: Sequence[str], size: tuple[int, int]) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", size, 60 * number).save(root / name / f"{number}.png")
    return str(root)


def test_load_data_resizes_to_what_the_network_was_trained_on_where_that_is_square(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "wide", ["a", "b"], (8, 6))
    trained = load_data(path).input
    assert trained.shape == (3, 6, 8)
    assert load_data(path, normalisation=trained).input.shape == (3, 6, 8)
    assert load_data(path, normalisation=replace(trained, shape=(3, 5, 5))).input.shape == (3, 5, 5)
    other = write_folder(tmp_path / "wider", ["a", "b"], (16, 12))
    with pytest.raises(DataError, match="images are 12 by 16, the network was trained on 6 by 8"):
        load_data(other, normalisation=trained)
    assert load_data(other, normalisation=trained, image_size=7).input.shape == (3, 7, 7)


def test_load_data_notes_a_folder_that_it_does_not_read_unless_it_is_asked_for(tmp_path: Path) -> None:
    for part in ("train", "test", "val"):
        write_folder(tmp_path / part, ["a", "b"], (4, 4))
    (note,) = load_data(str(tmp_path)).notes
    assert f"'{tmp_path / 'val'}' was not read" in note
    asked = load_data(str(tmp_path), validation_path=str(tmp_path / "val"))
    assert (asked.notes, len(asked.train), len(asked.validation)) == ((), 8, 8)


def test_load_data_refuses_classes_that_stand_elsewhere_in_the_network(tmp_path: Path) -> None:
    path = write_folder(tmp_path, ["cat", "dog"], (4, 4))
    assert load_data(path, classes=("cat", "dog", "yak")).classes == ("cat", "dog")
    assert load_data(path, classes=("0", "1")).classes == ("cat", "dog")
    with pytest.raises(DataError, match="has class 'cat' as number 0, for the network it is number 1"):
        load_data(path, classes=("ant", "cat", "dog"))
    numbered = write_folder(tmp_path / "numbered", ["1", "2"], (4, 4))
    assert load_data(numbered, classes=("0", "1", "2")).classes == ("1", "2")  # the network's are made up
    unnamed = write_npz(tmp_path / "set.npz")  # its classes are numbers, not names
    assert load_data(unnamed, classes=("0", "10", "1")).classes == ("0", "1", "2")


def test_load_data_warns_of_classes_that_the_network_does_not_know(tmp_path: Path) -> None:
    path = write_folder(tmp_path, ["cat", "dog", "yak"], (4, 4))
    (note,) = load_data(path, classes=("cat", "dog")).notes
    assert "knows no class 'yak' (number 2); its own are, in order, cat, dog" in note
    (note,) = load_data(path, classes=("apple", "fig", "pear")).notes
    assert "'cat' (number 0), 'dog' (number 1), 'yak' (number 2)" in note
    assert load_data(path, classes=("cat", "dog", "yak", "zebu")).notes == ()


def rows(inputs: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


def test_load_data_splits_are_disjoint_exhaustive_and_seeded(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz", count=40, size=8)
    spec = InputSpec((1, 8, 8), (0.0,), (1.0,))

    def split(fraction: float, seed: int) -> tuple[set[bytes], set[bytes], DataSet]:
        found = load_data(path, normalisation=spec, validation_fraction=fraction, validation_seed=seed)
        return rows(found.train.inputs), rows(found.validation.inputs), found

    with np.load(path) as file:
        every = rows(torch.from_numpy(file["images"][:, None]).float() / 255)
    train, held, found = split(0.25, 0)
    assert (len(train), len(held)) == (30, 10)
    assert train | held == every
    assert split(0.25, 0)[:2] == (train, held)
    assert split(0.25, 1)[1] != held
    assert len(split(0.001, 0)[1]) == 1
    assert found.test is None
    assert found.test_batches() is None


def test_load_data_keeps_images_beside_their_labels(tmp_path: Path) -> None:
    labels = np.arange(40) % 7
    images = np.repeat(labels[:, None, None], 4, 1).repeat(4, 2).astype(np.uint8)
    path = write_npz(
        tmp_path / "set.npz", images=images, labels=labels, test_images=images[:9], test_labels=labels[:9]
    )
    found = load_data(path, normalisation=InputSpec((1, 4, 4), (0.0,), (1 / 255,)))
    assert found.test is not None
    for part in (found.train, found.validation, found.test):
        assert torch.equal(part.inputs[:, 0, 0, 0].round().long(), part.labels)
    assert (len(found.train), len(found.validation), len(found.test)) == (36, 4, 9)


def test_load_data_takes_validation_data_of_its_own(tmp_path: Path) -> None:
    main = write_npz(tmp_path / "set.npz", count=30)
    other = write_npz(tmp_path / "held.npz", count=8)
    found = load_data(main, validation_path=other)
    assert (len(found.train), len(found.validation)) == (30, 8)


def test_load_data_refuses_validation_data_of_other_classes(tmp_path: Path) -> None:
    main = write_npz(tmp_path / "set.npz", classes=np.array(["cat", "dog", "owl"]))
    turned = write_npz(tmp_path / "turned.npz", classes=np.array(["dog", "cat", "owl"]))
    with pytest.raises(DataError, match=r"'dog', 'cat', 'owl'.*'cat', 'dog', 'owl'"):
        load_data(main, validation_path=turned)
    # fewer are no contradiction: no example of the last one was held out
    fewer = write_npz(tmp_path / "fewer.npz", classes=np.array(["cat", "dog"]), labels=np.arange(20) % 2)
    assert len(load_data(main, validation_path=fewer).validation) == 20


BAD_SETS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "empty": ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "is empty"),
    "nan": ({"images": np.full((20, 4, 4), np.nan, np.float32)}, "20 of 20 images hold NaN"),
    "infinity": ({"images": np.full((20, 4, 4), np.inf)}, "images hold NaN or infinity"),
    "negative_label": ({"labels": np.arange(20) - 1}, "from -1 to 18; allowed are 0 to 18"),
    "label_beyond_the_classes": ({"classes": np.array(["a", "b"])}, "from 0 to 2; allowed are 0 to 1"),
    "test_label_beyond_the_classes": (
        {"test_images": np.zeros((2, 4, 4), np.uint8), "test_labels": np.array([0, 3])},
        "test part: labels run from 0 to 3; allowed are 0 to 2",
    ),
    "test_of_another_size": (
        {"test_images": np.zeros((2, 5, 4), np.uint8), "test_labels": np.array([0, 1])},
        r"test part: images are \(1, 5, 4\), the training part's are \(1, 4, 4\)",
    ),
    "test_of_other_channels": (
        {"test_images": np.zeros((2, 3, 4, 4), np.uint8), "test_labels": np.array([0, 1])},
        r"test part: images are \(3, 4, 4\)",
    ),
    "too_few": ({"images": np.zeros((1, 4, 4), np.uint8), "labels": np.zeros(1, int)}, "leaves none"),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_load_data_says_what_is_wrong(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_SETS[name]
    with pytest.raises(DataError, match=message):
        load_data(write_npz(tmp_path / "bad.npz", **arrays))


def test_load_data_survives_a_channel_without_variance(tmp_path: Path) -> None:
    found = load_data(write_npz(tmp_path / "set.npz", images=np.zeros((20, 4, 4), np.uint8)))
    assert found.train.inputs.isfinite().all()
    assert found.input.std[0] > 0


def test_digits_are_the_1797_of_scikit_learn(digits: DataSet) -> None:
    assert digits.input.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert digits.test is not None
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1213, 135, 449)
    assert digits.train.inputs.mean().item() == pytest.approx(0.0, abs=0.02)
    assert digits.train.inputs.std().item() == pytest.approx(1.0, abs=0.02)
    every = torch.cat([part.labels for part in (digits.train, digits.validation, digits.test)])
    assert len(every.unique()) == 10


def test_digits_test_part_is_the_same_for_every_seed(digits: DataSet) -> None:
    other = load_data("digits", validation_seed=5)
    assert digits.test is not None
    assert other.test is not None
    assert torch.equal(other.test.inputs, digits.test.inputs)
    assert not torch.equal(other.validation.inputs, digits.validation.inputs)


def test_batches_of_each_part(digits: DataSet) -> None:
    train = digits.train_batches(100, seed=3)
    assert train.shuffle
    assert (train.num_examples, len(train), train.seed) == (1213, 12, 3)
    assert sum(len(labels) for _, labels in digits.validation_batches(50)) == 135
    test = digits.test_batches()
    assert test is not None
    assert not test.shuffle
    assert digits.test is not None
    assert torch.equal(torch.cat([labels for _, labels in test]), digits.test.labels)


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("digits", "auto", "none"),
        ("cifar10", "auto", "crop-flip"),
        ("cifar100", "auto", "crop-flip"),
        ("cifarsub", "auto", "none"),
        ("./cifar10", "auto", "none"),
        ("svhn", "auto", "none"),
        ("mnist", "auto", "none"),
        ("cifar10", "none", "none"),
        ("digits", "crop", "crop"),
        ("digits", "crop-flip", "crop-flip"),
    ],
)
def test_train_batches_augment_where_the_label_stays(
    digits: DataSet, name: str, asked: str, expected: str
) -> None:
    renamed = DataSet(name, digits.input, digits.classes, digits.train, digits.validation, None)
    assert renamed.train_batches(10, seed=0, augment=asked).augment == expected


def test_small_deviations_are_measured_to_four_digits(tmp_path: Path) -> None:
    images = 4e-5 * np.random.default_rng(0).random((40, 1, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "dim.npz", images=images, labels=np.arange(40) % 2)
    data = load_data(str(tmp_path / "dim.npz"))
    assert data.input.mean[0] == pytest.approx(images.mean(), rel=1e-3)
    assert data.input.std[0] == pytest.approx(images.std(), rel=1e-3)
    assert float(data.train.inputs.std()) == pytest.approx(1.0, rel=0.1)
