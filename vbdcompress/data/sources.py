"""Named data sets as raw tensors: digits, torchvision's classification sets, folders, .npz files."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch
from torch import Tensor

from vbdcompress.data.folders import read_folder
from vbdcompress.data.raw import RawImages, RawSet
from vbdcompress.errors import DataError

# Of floats from 0 to 1, with what resizing and added noise put on top
LARGEST_PIXEL = 2.0
# Above what is named or trained on: labels beyond are codes of another kind
MOST_CLASSES = 2**20

Array: TypeAlias = np.ndarray[Any, Any]


def read_source(name: str, root: Path | None, image_size: int | None, apart: Path | None = None) -> RawSet:
    """The raw tensors of a data set.

    Args:
        name: one of NAMED_SETS, a folder of class folders, or an .npz file.
        root: where torchvision keeps its sets; downloads there what is missing.
        image_size: that the shorter side of a folder's images is resized to, before the middle is cut out.
        apart: a folder that is validation data, and so no test part of this one.
    Raises:
        DataError: unknown name, missing or malformed data.
    """
    if name == "digits":
        return _read_digits()
    if name in TORCHVISION_SETS:
        return _read_torchvision(name, root)
    path = Path(name)
    if path.suffix == ".npz" and path.is_file():
        return _read_npz(path)
    if path.is_dir():
        return read_folder(path, image_size, apart)
    near = get_close_matches(name.lower(), NAMED_SETS, n=1) if path.name == name else ()
    raise DataError(
        f"data set '{name}'",
        "is neither a known name, a folder of class folders nor an .npz file"
        + (f"; did you mean '{near[0]}'?" if near else "."),
        f"Known: {', '.join(NAMED_SETS)}",
    )


def is_folder(name: str) -> bool:
    """Whether `read_source` takes the name as a folder of images."""
    return name not in NAMED_SETS and Path(name).is_dir()


def _read_digits() -> RawSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.uint8)[:, None]
    labels = torch.tensor(digits.target, dtype=torch.int64)
    # scikit-learn ships no test split; this one is fixed, whatever a run's seed is
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    test, train = order[:449], order[449:]
    return RawSet(
        RawImages(images[train], labels[train], 16.0),
        RawImages(images[test], labels[test], 16.0),
        tuple(str(name) for name in digits.target_names),
    )


def _by_train_flag(cls: Callable[..., Any]) -> Callable[[str, bool], Any]:
    return lambda root, train: cls(root, train=train, download=True)


def _by_split_name(cls: Callable[..., Any]) -> Callable[[str, bool], Any]:
    return lambda root, train: cls(root, split="train" if train else "test", download=True)


# name -> (class in torchvision.datasets, how it is asked for a part)
TORCHVISION_SETS: dict[str, tuple[str, Callable[[Callable[..., Any]], Callable[[str, bool], Any]]]] = {
    "mnist": ("MNIST", _by_train_flag),
    "fashion_mnist": ("FashionMNIST", _by_train_flag),
    "kmnist": ("KMNIST", _by_train_flag),
    "cifar10": ("CIFAR10", _by_train_flag),
    "cifar100": ("CIFAR100", _by_train_flag),
    "svhn": ("SVHN", _by_split_name),
    "stl10": ("STL10", _by_split_name),
}
NAMED_SETS = ("digits", *TORCHVISION_SETS)


def _read_torchvision(name: str, root: Path | None) -> RawSet:
    from torchvision import datasets

    if root is None:
        raise DataError(f"data set '{name}'", "needs a folder to lie in.", "Say where: --data-root ROOT")
    class_name, how = TORCHVISION_SETS[name]
    open_part = how(getattr(datasets, class_name))
    try:
        train, test = open_part(str(root), True), open_part(str(root), False)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"data set '{name}'", f"is not under '{root}' and could not be downloaded there: {error}"
        ) from error
    train_images, test_images = _raw_images(train), _raw_images(test)
    classes = getattr(train, "classes", None) or range(int(train_images.labels.max()) + 1)
    return RawSet(train_images, test_images, tuple(str(item) for item in classes))


def _raw_images(part: Any) -> RawImages:
    labels = getattr(part, "targets", None)
    labels = part.labels if labels is None else labels
    return RawImages(
        _channels_first(torch.as_tensor(part.data)), torch.as_tensor(labels, dtype=torch.int64), 255.0
    )


def _channels_first(images: Tensor) -> Tensor:
    """[n, h, w], [n, h, w, c] or [n, c, h, w] -> [n, c, h, w]; c is 1, 3 or 4."""
    if images.dim() == 3:
        return images[:, None]
    if images.shape[1] in (1, 3, 4):
        return images
    return images.permute(0, 3, 1, 2).contiguous()


def _read_npz(path: Path) -> RawSet:
    where = f"data set '{path}'"
    try:
        with path.open("rb") as opened, np.lib.npyio.NpzFile(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, BadZipFile, ZlibError, NotImplementedError) as error:
        raise DataError(where, f"can't be read as .npz: {error}") from error
    odd = [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]
    if odd:  # numpy hands on what is no .npy as bytes
        raise DataError(where, f"holds '{odd[0]}', which is no array.")
    if not {"images", "labels"} <= set(arrays):
        raise DataError(
            where,
            f"holds {sorted(arrays)}, needs 'images' and 'labels'.",
            "'test_images' and 'test_labels' may stand beside them.",
        )
    test = None
    test_keys = {"test_images", "test_labels"} & set(arrays)
    if len(test_keys) == 1:
        raise DataError(where, f"holds {sorted(test_keys)}, needs both 'test_images' and 'test_labels'.")
    if test_keys:
        test = _npz_part(where, arrays, "test_images", "test_labels")
    train = _npz_part(where, arrays, "images", "labels")
    highest = int(train.labels.max()) if len(train.labels) else -1
    return RawSet(train, test, _npz_classes(where, arrays.get("classes"), highest))


def _npz_classes(where: str, names: Array | None, highest: int) -> tuple[str, ...]:
    if names is None:
        if highest >= MOST_CLASSES:
            raise DataError(
                where,
                f"labels run up to {highest}, allowed are 0 to {MOST_CLASSES - 1}.",
                "Number the classes from 0; their names may stand beside them as 'classes'.",
            )
        return tuple(str(number) for number in range(highest + 1))
    if names.ndim != 1:
        raise DataError(where, f"classes have shape {names.shape}, must be a name for each class.")
    try:
        return tuple(item.decode() if isinstance(item, bytes) else str(item) for item in names)
    except UnicodeDecodeError as error:
        raise DataError(where, f"classes are bytes, but no UTF-8: {error}") from error


def _npz_part(where: str, arrays: Mapping[str, Array], images_key: str, labels_key: str) -> RawImages:
    images, labels = arrays[images_key], arrays[labels_key]
    if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            where,
            f"{images_key} have shape {images.shape} and {labels_key} {labels.shape}; allowed are "
            "[n, h, w], [n, h, w, c] or [n, c, h, w] beside [n].",
        )
    if images.ndim == 4 and not {images.shape[1], images.shape[3]} & {1, 3, 4}:
        raise DataError(where, f"{images_key} have shape {images.shape}; allowed are 1, 3 or 4 channels.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(where, f"{labels_key} are {labels.dtype}, must be integers.")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            where, f"{images_key} are {images.dtype}, must be uint8 (0 to 255) or floats (0 to 1)."
        )
    if images.dtype != np.uint8 and images.size:
        _check_floats(where, images_key, float(images.min()), float(images.max()))
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    tensor = torch.from_numpy(images if scale == 255.0 else images.astype(np.float32))
    return RawImages(_channels_first(tensor), torch.from_numpy(labels.astype(np.int64)), scale)


def _check_floats(where: str, key: str, lowest: float, highest: float) -> None:
    """Raise DataError for pixels that are not scaled to [0, 1]; those normalised already go below 0."""
    if lowest < 0 or not LARGEST_PIXEL < highest < np.inf:
        return
    raise DataError(
        where,
        f"{key} run from {lowest:g} to {highest:g}, must be uint8 (0 to 255) or floats (0 to 1).",
        "Store bytes as uint8, or divide by the value of a fully bright pixel, 255 for bytes. If the network "
        "was trained on them undivided, divide its --mean and --std by the same (none: --mean 0 "
        "--std 0.00392157 for bytes).",
    )
