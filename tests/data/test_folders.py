"""Reading folders of images, good and bad."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from vbdcompress.data import load_data
from vbdcompress.data.folders import read_folder
from vbdcompress.errors import DataError


def write_folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (4, 4)) -> None:
    """PNGs of one colour for each class: ROOT/CLASS/N.png, its red is class and number."""
    for place, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for item in range(count):
            Image.new("RGB", size, (100 * place + item, 7, 9)).save(root / name / f"{item}.png")


def test_read_folder_without_parts(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 3, "dog": 2})
    found = read_folder(tmp_path, None)
    assert found.classes == ("cat", "dog")
    assert found.test is None
    assert found.train.images.shape == (5, 3, 4, 4)
    assert found.train.images.dtype == torch.uint8
    assert found.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101]
    assert found.train.images[:, 1:, 0, 0].unique(dim=0).tolist() == [[7, 9]]
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("part", ["test", "val", None])
def test_read_folder_with_parts(tmp_path: Path, part: str | None) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 1})
    if part:
        write_folder(tmp_path / part, {"cat": 1, "dog": 4})
    found = read_folder(tmp_path, None)
    assert len(found.train.labels) == 3
    assert (found.test.labels.tolist() if found.test else None) == ([0, 1, 1, 1, 1] if part else None)


@pytest.mark.parametrize(("apart", "test_labels"), [("val", None), ("test", None), ("elsewhere", [0, 1])])
def test_a_part_given_as_validation_data_is_no_test_set(
    tmp_path: Path, apart: str, test_labels: list[int] | None
) -> None:
    write_folder(tmp_path / "train", {"cat": 20, "dog": 1})
    write_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    for part in {"test", "elsewhere"} & {apart}:
        write_folder(tmp_path / part, {"cat": 1, "dog": 1})
    found = load_data(str(tmp_path), validation_path=str(tmp_path / "train" / ".." / apart))
    assert (found.test.labels.tolist() if found.test else None) == test_labels
    assert len(found.validation) == 2
    assert [note for note in found.notes if "taken for the test set" in note] == list(found.notes)
    assert len(found.notes) == (apart == "elsewhere")


def test_validation_data_beside_classes_are_no_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 3, "dog": 3})
    write_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="'val' but no 'train'"):
        load_data(str(tmp_path), validation_path=str(tmp_path / "val"))


def test_read_folder_resizes_to_one_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"cat": 1, "dog": 1}, size=(9, 5))
    write_folder(tmp_path / "b", {"cat": 1, "dog": 1}, size=(5, 12))
    (tmp_path / "a" / "cat" / "0.png").rename(tmp_path / "b" / "cat" / "other.png")
    with pytest.raises(DataError, match="--image-size"):
        read_folder(tmp_path / "b", None)
    assert read_folder(tmp_path / "b", 6).train.images.shape == (3, 3, 6, 6)


def test_read_folder_refuses_other_classes_in_the_test_part(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 1, "dog": 1})
    write_folder(tmp_path / "test", {"cat": 1, "owl": 1})
    with pytest.raises(DataError, match=r"'dog'.*'owl'"):
        read_folder(tmp_path, None)


def test_read_folder_refuses_a_test_part_without_training_part(tmp_path: Path) -> None:
    write_folder(tmp_path / "test", {"cat": 1})
    write_folder(tmp_path / "val", {"cat": 1})
    with pytest.raises(DataError, match="no 'train'"):
        read_folder(tmp_path, None)


def test_read_folder_refuses_what_holds_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder of class folders"):
        read_folder(tmp_path, None)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="folder of class folders"):
        read_folder(tmp_path, None)
    (tmp_path / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no image")
    with pytest.raises(DataError, match=r"file '.*0\.png': can't be read as an image"):
        read_folder(tmp_path, None)


def test_read_folder_refuses_more_than_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"cat": 3})
    monkeypatch.setattr("vbdcompress.data.folders.MAX_FOLDER_BYTES", 100)
    with pytest.raises(DataError, match=r"3 images of \(3, 4, 4\) are more than"):
        read_folder(tmp_path, None)


GREYS = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369  # 17 times 257, so that bytes hold them exactly


@pytest.mark.parametrize(
    ("name", "images"),
    [("0.png", GREYS), ("0.tif", GREYS), ("0.tiff", GREYS.astype(">u2")), ("0.TIF", GREYS.astype(np.int32))],
    ids=["png", "tiff", "tiff_big_endian", "tiff_of_32_bits"],
)
def test_read_folder_scales_16_bits_to_8(tmp_path: Path, name: str, images: np.ndarray) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(images).save(tmp_path / "cat" / name)
    (found,) = read_folder(tmp_path, None).train.images
    assert (found == torch.arange(0, 256, 17).reshape(4, 4)).all()


def test_read_folder_scales_a_pgm_of_16_bits(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.pgm").write_bytes(b"P5 4 4 65535\n" + GREYS.astype(">u2").tobytes())
    assert (read_folder(tmp_path, None).train.images[0] == torch.arange(0, 256, 17).reshape(4, 4)).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (GREYS / np.float32(65535), "holds floats; allowed are 8 or 16 bits"),
        (GREYS.astype(np.int32) * 2, "holds values from 0 to 131070, allowed are 0 to 65535"),
        (GREYS.astype(np.int32) - 9, "holds values from -9 to 65526"),
    ],
)
def test_read_folder_refuses_images_that_no_byte_holds(
    tmp_path: Path, images: np.ndarray, message: str
) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(images).save(tmp_path / "cat" / "strange.tif")
    with pytest.raises(DataError, match=rf"strange\.tif.*{message}"):
        read_folder(tmp_path, None)


def test_read_folder_reads_colours_and_greys_as_rgb(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    pixel = {"1": 1, "L": 60, "P": 3, "RGBA": (60, 70, 80, 9), "CMYK": (0, 255, 255, 0), "LA": (60, 7)}
    for number, (mode, value) in enumerate(pixel.items()):
        Image.new(mode, (2, 2), value).save(tmp_path / "cat" / f"{number}.tif")
    expected = [
        Image.new(mode, (1, 1), value).convert("RGB").getpixel((0, 0)) for mode, value in pixel.items()
    ]
    found = read_folder(tmp_path, None).train.images
    assert [tuple(image) for image in found[:, :, 0, 0].tolist()] == expected
    assert (found == found[:, :, :1, :1]).all()


def test_read_folder_passes_over_what_is_hidden(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 1})
    write_folder(tmp_path / "test", {"cat": 1, "dog": 1})
    for hidden in (".thumbs", "train/.ipynb_checkpoints", "train/cat/.thumbs"):
        (tmp_path / hidden).mkdir()
        Image.new("RGB", (4, 4), (255, 7, 9)).save(tmp_path / hidden / "0.png")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"of another system")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    found = read_folder(tmp_path, None)
    assert found.classes == ("cat", "dog")
    assert found.train.labels.tolist() == [0, 0, 1]
    assert found.train.images[:, 0, 0, 0].tolist() == [0, 1, 100]
    assert read_folder(tmp_path / "train", None).classes == ("cat", "dog")


def test_read_folder_goes_through_files_as_torchvision_does(tmp_path: Path) -> None:
    for place, name in enumerate(
        ["b/a/9.png", "b/1.png", "b/a!/3.jpg", "b/a/10.BMP", "B/2.png", "a/x/y/0.webp"]
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (40 * place, 0, 0)).save(path)
    theirs = ImageFolder(str(tmp_path), transform=PILToTensor())
    ours = read_folder(tmp_path, None)
    assert ours.classes == tuple(theirs.classes)
    assert ours.train.labels.tolist() == theirs.targets
    assert torch.equal(ours.train.images, torch.stack([image for image, _ in theirs]))


def test_read_folder_counts_empty_class_folders_and_refuses_other_files(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 0, "cat": 2})
    found = read_folder(tmp_path, None)
    assert (found.classes, found.train.labels.tolist()) == (("ant", "cat"), [1, 1])
    (tmp_path / "ant" / "0.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"class 'ant' has files, but none .*\.jpg"):
        read_folder(tmp_path, None)


@pytest.mark.parametrize("names", [("training", "testing"), ("Train", "Test"), ("dev",)])
def test_read_folder_refuses_parts_of_other_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_folder(tmp_path / name, {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match=rf"{', '.join(sorted(names))}.*'train' and 'test'"):
        read_folder(tmp_path, None)
    write_folder(tmp_path, {"carriage": 1})  # classes of trains
    assert len(read_folder(tmp_path, None).classes) == len(names) + 1


@pytest.mark.parametrize(
    ("parts", "unread"),
    [
        (["train", "test", "val"], ["val"]),
        (["train", "test", "valid"], ["valid"]),
        (["train", "validation"], ["validation"]),
        (["train", "test", "labels"], []),
    ],
)
def test_read_folder_notes_the_parts_that_it_does_not_read(
    tmp_path: Path, parts: list[str], unread: list[str]
) -> None:
    for part in parts:
        write_folder(tmp_path / part, {"cat": 1, "dog": 1})
    notes = read_folder(tmp_path, None).notes
    assert read_folder(tmp_path, None, tmp_path / "elsewhere").notes == ()
    assert len(notes) == len(unread)
    for note, name in zip(notes, unread, strict=True):
        assert f"'{tmp_path / name}' was not read" in note
        assert f"--validation {tmp_path / name}" in note


def test_a_class_that_no_report_could_name_is_refused(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    try:
        (tmp_path / name).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"has a folder 'caf.*whose name is no UTF-8"):
        read_folder(tmp_path, 8)


def test_images_larger_than_memory_are_refused_before_one_is_resized(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "one.png")
    with pytest.raises(DataError, match=r"2 images of \(3, 100000, 100000\) are more than 8 GiB"):
        read_folder(tmp_path, 100_000)


def test_a_link_back_into_a_folder_is_not_followed_for_ever(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name / "inner" / f"{number}.png")
    (tmp_path / "a" / "inner" / "loop").symlink_to(tmp_path / "a")
    data = load_data(str(tmp_path), None)
    assert len(data.train) + len(data.validation) == 20


def test_training_data_are_refused_as_validation_data(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / name / "1.png")
    for path in (tmp_path, tmp_path / "train", tmp_path / "test" / ".." / "train"):
        with pytest.raises(DataError, match="are its training data"):
            load_data(str(tmp_path), None, validation_path=str(path))
    assert len(load_data(str(tmp_path), None, validation_path=str(tmp_path / "test")).validation) == 2
