"""The weights in a file, under whatever names training scripts gave them."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.errors import LoadError


def find_state_dict(path: Path, content: Any) -> Mapping[str, Tensor]:
    """The state_dict in a file: bare, or under the keys that training scripts use."""
    if isinstance(content, Mapping):
        for key in ("state_dict", "model_state_dict", "model", "net"):
            if isinstance(content.get(key), Mapping):
                return find_state_dict(path, content[key])
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
    kinds = type(content).__name__
    if isinstance(content, Mapping):
        kinds += f" with keys {', '.join(map(str, list(content)[:8]))}"
    raise LoadError(
        f"file '{path}'",
        f"holds a {kinds}, not the weights of a network.",
        "Allowed: a state_dict, or a dict that has one under 'state_dict' or 'model'.",
    )


def _without_wrappers(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """By the network's own names: DataParallel, torch.compile and training classes put others before them.

    What stands beside the network in a training class, such as a loss with weights, is left out.
    """
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    if not expected or set(state) & set(expected):
        return state
    prefixes = {key.removesuffix(name) for name in expected for key in state if key.endswith(f".{name}")}
    fitting = [prefix for prefix in prefixes if not _missing(state, expected, prefix)]
    if len(fitting) != 1:  # of two networks nobody says which
        return {key.removeprefix("module."): value for key, value in state.items()}
    (prefix,) = fitting
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_state_(path: Path, arch: str, model: nn.Module, state: Any) -> None:
    """Give a network the weights of a file, in place. Raises LoadError where they do not fit, or are none."""
    expected = model.state_dict()
    where = f"file '{path}'"
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise LoadError(where, "holds a 'state_dict' that is no dict of names and tensors.")
    odd = [key for key, value in state.items() if not isinstance(key, str) or not _is_plain(value)]
    if odd:
        told = f"{odd[0]!r} is {state[odd[0]].dtype}, {state[odd[0]].layout}, on {state[odd[0]].device}"
        raise LoadError(where, f"holds what is no weight of a network: {told}.", "Allowed are dense tensors.")
    versions = getattr(state, "_metadata", None)
    given, state = state, _without_wrappers(state, expected)
    # torch counts batches from 0 where files of before it counted them say nothing
    missing = [key for key in _missing(state, expected) if not key.endswith(".num_batches_tracked")]
    unknown = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, should be {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    complex_ones = [
        key
        for key, tensor in expected.items()
        if key in state and state[key].is_complex() != tensor.is_complex()
    ]
    problems = [
        f"{what}: {', '.join(keys[:8])}" + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        for what, keys in (
            ("missing", missing),
            ("not known", unknown),
            ("of another shape", shapes),
            ("complex, or should be", complex_ones),
        )
        if keys
    ]
    if problems:
        raise LoadError(where, f"does not fit architecture '{arch}'; {'; '.join(problems)}.")
    fitting = OrderedDict(state)
    # By it modules know weights of an older kind; the names in it are those of the file
    fitting._metadata = (versions if set(given) == set(state) else None) or expected._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(fitting, strict=False)
    except (RuntimeError, ValueError) as error:
        raise LoadError(where, f"does not fit architecture '{arch}': {error}") from error


def memory_of(entry: Any) -> Any:
    """The same for tensors that are one; None for those without elements, and for a module's extra state."""
    if not isinstance(entry, Tensor) or not entry.numel():
        return None
    return entry.data_ptr(), entry.shape, entry.stride()


def _missing(state: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Of weights that are tied a file may hold one."""
    given = {memory_of(entry) for key, entry in expected.items() if prefix + key in state} - {None}
    return [
        key for key, entry in expected.items() if prefix + key not in state and memory_of(entry) not in given
    ]


def _is_plain(tensor: Tensor) -> bool:
    """Dense, with values, and these not the codes of a quantised network."""
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
