"""Reading data sets: torchvision's formats and .npz files, good and bad."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets

from vbdcompress.data.raw import RawImages
from vbdcompress.data.sources import NAMED_SETS, read_source
from vbdcompress.errors import DataError

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (6, 5, 7), dtype=np.uint8)
COLOUR = GENERATOR.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
LABELS = np.arange(6) % 3


@pytest.mark.parametrize(
    ("images", "expected", "scale"),
    [
        (GREY, GREY[:, None], 255.0),
        (GREY[..., None], GREY[:, None], 255.0),
        (GREY[:, None], GREY[:, None], 255.0),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2), 255.0),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2), 255.0),
        ((COLOUR / 255).astype(np.float64), (COLOUR / 255).transpose(0, 3, 1, 2), 1.0),
        ((GREY / 255).astype(np.float16), (GREY / 255).astype(np.float16)[:, None], 1.0),
    ],
    ids=["grey", "grey_last", "grey_first", "colour_last", "colour_first", "float64", "float16"],
)
def test_read_npz_takes_every_layout(
    tmp_path: Path, images: np.ndarray, expected: np.ndarray, scale: float
) -> None:
    np.savez_compressed(tmp_path / "set.npz", images=images, labels=LABELS.astype(np.uint8))
    found = read_source(str(tmp_path / "set.npz"), None, None)
    assert found.train.scale == scale
    np.testing.assert_allclose(found.train.images.numpy(), expected, rtol=1e-6)
    assert found.train.labels.tolist() == LABELS.tolist()
    assert found.train.labels.dtype == torch.int64
    assert found.classes == ("0", "1", "2")
    assert found.test is None


def test_read_npz_takes_test_part_and_classes(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "set.npz",
        images=GREY,
        labels=LABELS,
        test_images=GREY[:2],
        test_labels=LABELS[:2],
        classes=np.array(["cat", "dog", "owl"]),
    )
    found = read_source(str(tmp_path / "set.npz"), None, None)
    assert found.classes == ("cat", "dog", "owl")
    assert found.test is not None
    assert found.test.labels.tolist() == [0, 1]


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "float_labels": ({"labels": LABELS / 1.0}, "labels are float64, must be integers"),
    "bool_labels": ({"labels": LABELS > 1}, "labels are bool, must be integers"),
    "object_labels": ({"labels": LABELS.astype(object)}, "allow_pickle=False"),
    "object_images": ({"images": GREY.astype(object)}, "allow_pickle=False"),
    "int_images": ({"images": GREY.astype(np.int64)}, "images are int64, must be uint8"),
    "float_bytes": ({"images": GREY.astype(np.float32)}, r"images run from \d+ to 2\d\d, must be uint8"),
    "float_grey_levels": (
        {"images": GREY.astype(np.float64) // 16},
        "images run from 0 to 15, must be uint8",
    ),
    "float_bytes_to_test_on": (
        {"test_images": GREY.astype(np.float16), "test_labels": LABELS},
        r"test_images run from \d+ to 2\d\d, must be uint8",
    ),
    "int_images_to_test_on": (
        {"test_images": GREY.astype(np.int64), "test_labels": LABELS},
        "test_images are int64, must be uint8",
    ),
    "fewer_labels": ({"labels": LABELS[:5]}, r"\(6, 5, 7\) and labels \(5,\)"),
    "one_hot_labels": ({"labels": np.eye(6, dtype=int)}, r"labels \(6, 6\)"),
    "scalar_labels": ({"labels": np.array(3)}, r"labels \(\)"),
    "scalar_images": ({"images": np.array(3, np.uint8)}, r"images have shape \(\)"),
    "flat_images": ({"images": GREY.reshape(6, -1)}, r"images have shape \(6, 35\)"),
    "seven_channels": ({"images": GREY[..., None].repeat(2, -1)}, "1, 3 or 4 channels"),
    "scalar_classes": ({"classes": np.array("cat")}, r"classes have shape \(\), must be a name for each"),
    "table_of_classes": ({"classes": np.array([["a", "b"]])}, r"classes have shape \(1, 2\)"),
    "classes_of_other_bytes": ({"classes": np.array([b"a", b"\xff"])}, "classes are bytes, but no UTF-8"),
    "huge_labels": ({"labels": LABELS + 2**40}, r"labels run up to 1099511627778, allowed are 0 to 1048575"),
    "half_a_test_part": ({"test_images": GREY}, "'test_labels'"),
    "short_test_part": ({"test_images": GREY, "test_labels": LABELS[:2]}, r"labels \(2,\)"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_read_npz_says_what_is_wrong(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_ARRAYS[name]
    np.savez(tmp_path / "bad.npz", **({"images": GREY, "labels": LABELS} | arrays))
    with pytest.raises(DataError, match=message) as caught:
        read_source(str(tmp_path / "bad.npz"), None, None)
    assert "bad.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (np.array([b"cat", "Öre".encode(), b"2"]), ("cat", "Öre", "2")),
        (np.array([5, 6, 7]), ("5", "6", "7")),
    ],
)
def test_read_npz_takes_classes_of_bytes_and_numbers(
    tmp_path: Path, classes: np.ndarray, names: tuple[str, ...]
) -> None:
    np.savez(tmp_path / "set.npz", images=GREY, labels=LABELS, classes=classes)
    assert read_source(str(tmp_path / "set.npz"), None, None).classes == names


@pytest.mark.parametrize(
    "images",
    [GREY / 255 * 1.1, (GREY / 255 - 0.13) / 0.3, GREY - 128.0],
    ids=["overshot", "by_deviation", "by_mean"],
)
def test_read_npz_takes_floats_that_are_normalised_already(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "set.npz", images=images, labels=LABELS)
    found = read_source(str(tmp_path / "set.npz"), None, None).train
    np.testing.assert_allclose(found.images.numpy()[:, 0], images, rtol=1e-5)
    assert found.scale == 1.0


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_read_npz_names_the_key_that_is_missing(tmp_path: Path, missing: str) -> None:
    content = {"images": GREY, "labels": LABELS}
    content["x"] = content.pop(missing)
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(DataError, match=r"holds .*'x'.*, needs 'images' and 'labels'"):
        read_source(str(tmp_path / "bad.npz"), None, None)


@pytest.mark.parametrize("keep", [0, 3, 40, 300, -30, -400])
def test_read_npz_refuses_a_file_cut_short(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.npz"
    np.savez_compressed(path, images=GREY, labels=LABELS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"can't be read as \.npz"):
        read_source(str(path), None, None)


def test_read_npz_refuses_other_formats_under_its_name(tmp_path: Path) -> None:
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, GREY)
    (tmp_path / "text.npz").write_text("images, labels")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"images": 1}))
    for name in ("array", "text", "pickle"):
        with pytest.raises(DataError, match=r"can't be read as \.npz"):
            read_source(str(tmp_path / f"{name}.npz"), None, None)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("mnst", "mnist"), ("MNIST", "mnist"), ("cifar-10", "cifar10"), ("Fashion-MNIST", "fashion_mnist")],
)
def test_read_source_suggests_the_nearest_name(asked: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"did you mean '{meant}'") as caught:
        read_source(asked, None, None)
    assert all(name in str(caught.value) for name in NAMED_SETS)


def test_read_source_needs_a_root_for_torchvision() -> None:
    with pytest.raises(DataError, match="--data-root"):
        read_source("mnist", None, None)


def test_read_source_says_when_a_download_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"is not under .* no route to host"):
        read_source("cifar10", tmp_path, None)


def need(path: Path) -> None:
    if not path.exists():
        pytest.skip(f"{path.name} is not under VBDCOMPRESS_DATA")


def check_part(part: RawImages | None, count: int, shape: tuple[int, ...], each: int | None) -> None:
    assert part is not None
    assert part.images.shape == (count, *shape)
    assert (part.images.dtype, part.scale) == (torch.uint8, 255.0)
    if each:
        assert part.labels.bincount().tolist() == [each] * 10


def test_read_source_mnist(data_root: Path) -> None:
    need(data_root / "MNIST" / "raw")
    found = read_source("mnist", data_root, None)
    check_part(found.train, 60000, (1, 28, 28), None)
    check_part(found.test, 10000, (1, 28, 28), None)
    assert found.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    # the mean and deviation that every MNIST recipe quotes
    assert found.train.images.double().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert len(found.classes) == 10


def test_read_source_cifar10(data_root: Path) -> None:
    need(data_root / "cifar-10-batches-py")
    found = read_source("cifar10", data_root, None)
    check_part(found.train, 50000, (3, 32, 32), 5000)
    check_part(found.test, 10000, (3, 32, 32), 1000)
    assert found.classes[:3] == ("airplane", "automobile", "bird")
    means = found.train.images[::10].float().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-3)


def test_read_source_fashion_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 2)):
        header = struct.pack(">HBBIII", 0, 8, 3, count, 5, 7)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + GREY[:count].tobytes())
        header = struct.pack(">HBBI", 0, 8, 1, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(LABELS[:count].tolist()))
    found = read_source("fashion_mnist", tmp_path, None)
    check_part(found.test, 2, (1, 5, 7), None)
    assert torch.equal(found.train.images[:, 0], torch.from_numpy(GREY))
    assert found.train.labels.tolist() == LABELS.tolist()
    assert found.classes[0] == "T-shirt/top"


def test_read_source_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 6), ("test", 3)):
        # the files hold [h, w, c, n] and call the digit 0 ten
        content = {
            "X": COLOUR[:count].transpose(1, 2, 3, 0),
            "y": np.array([10, 1, 2, 9, 1, 2])[:count, None],
        }
        savemat(tmp_path / f"{part}_32x32.mat", content)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", lambda *_: None)
    found = read_source("svhn", tmp_path, None)
    check_part(found.test, 3, (3, 5, 7), None)
    assert torch.equal(found.train.images, torch.from_numpy(COLOUR.transpose(0, 3, 1, 2).copy()))
    assert found.train.labels.tolist() == [0, 1, 2, 9, 1, 2]
    assert found.classes == tuple("0123456789")


def test_read_source_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    images = GENERATOR.integers(0, 256, (4, 3072), dtype=np.uint8)
    for part in ("train", "test"):
        (folder / part).write_bytes(pickle.dumps({"data": images, "fine_labels": [3, 0, 99, 4]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{item}" for item in range(100)]}))
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = read_source("cifar100", tmp_path, None)
    assert torch.equal(found.train.images, torch.from_numpy(images.reshape(4, 3, 32, 32)))
    assert found.train.labels.tolist() == [3, 0, 99, 4]
    assert found.classes[99] == "c99"


def test_an_npz_with_a_member_that_is_no_array_is_named(tmp_path):
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"no array at all")
        archive.writestr("labels.npy", b"nor this")
    with pytest.raises(DataError, match="holds 'images', which is no array"):
        read_source(str(path), None, None)
