"""Random inputs for ONNX files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from vbdcompress.errors import ExportError

Feeds = dict[str, npt.NDArray[Any]]
# onnxruntime's names of types
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def make_feeds(session: onnxruntime.InferenceSession, batch: int, dims: Mapping[str, int]) -> Feeds:
    """Random inputs for a session: normal numbers, zeros where it takes integers.

    Args:
        batch: size of each first dimension that the file leaves open.
        dims: values of dimensions by `names_of_dims`.
    Raises:
        ExportError: an input has a dimension that nobody gave, or a type that there are no values for.
    """
    generator = np.random.default_rng(0)
    feeds: Feeds = {}
    for item in session.get_inputs():
        shape = []
        for place, (dim, name) in enumerate(zip(item.shape, names_of_dims(item), strict=True)):
            size = dim if isinstance(dim, int) else dims.get(name, batch if place == 0 else None)
            if size is None:
                raise ExportError(
                    f"input '{item.name}'", f"has a dimension '{name}' of any size.", f"--dim {name}=SIZE"
                )
            shape.append(size)
        if item.type not in _DTYPES:
            raise ExportError(f"input '{item.name}'", f"is a {item.type}, which bench has no values for.")
        kind = _DTYPES[item.type]
        drawn = generator.standard_normal(shape) if np.issubdtype(kind, np.floating) else np.zeros(shape)
        feeds[item.name] = drawn.astype(kind)
    return feeds


def names_of_dims(item: Any) -> list[str]:
    """What each dimension of a session's input is called: by the file, else by its place, as in x.2."""
    return [dim if isinstance(dim, str) else f"{item.name}.{place}" for place, dim in enumerate(item.shape)]


def batch_of(session: onnxruntime.InferenceSession, feeds: Feeds) -> int:
    """Number of examples: the first dimension of the first input that leaves it open, else of the first."""
    dims = [(item.shape[0], feeds[item.name].shape[0]) for item in session.get_inputs() if item.shape]
    sizes = [size for dim, size in dims if not isinstance(dim, int)] or [size for _, size in dims]
    return sizes[0] if sizes else 1


def run_feeds(
    session: onnxruntime.InferenceSession, path: Path, feeds: Feeds, outputs: Sequence[str] | None = None
) -> list[Any]:
    """What a session gives for feeds: these outputs, or all.

    Raises:
        ExportError: onnxruntime fails; it names the file and the batch.
    """
    try:
        found: list[Any] = session.run(outputs, feeds)
    except Exception as error:  # onnxruntime's own exception types are not importable by name
        batch = batch_of(session, feeds)
        raise ExportError(
            f"file '{path}'",
            f"onnxruntime fails on a batch of {batch}: {error}",
            "Name batches that it takes, such as the one that it was traced with: --batch 1",
        ) from error
    return found
