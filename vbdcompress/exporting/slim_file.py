"""The slim torch network on disk: safetensors with the removal plan. Never a pickle."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import ExportedProgram

from vbdcompress.architectures import build_architecture
from vbdcompress.errors import LoadError
from vbdcompress.exported import from_exported
from vbdcompress.files import replacing
from vbdcompress.modes import evaluated
from vbdcompress.originals import unwrap
from vbdcompress.records import InputSpec
from vbdcompress.state_dicts import memory_of
from vbdcompress.surgery.slice import RemovalPlan, apply_plan_

FORMAT, VERSION = "vbdcompress.slim", 1
MASK, VALUES = ".mask", ".values"


@dataclass(frozen=True)
class SlimFile:
    """What stands in a slim file beside its tensors.

    Attributes:
        plans: removal plans in the order in which they were applied: one a stage.
        architecture, arguments: how the original network is built; None where it was the user's object.
        data: name of the data set; None where it was the user's loader.
        input: shape and normalisation.
        validation: {"fraction", "seed"} of the validation split, with "held_out": False where training may
            have seen it, and "examples" that were split; None where nobody says.
        classes: names of the outputs; empty where nobody says.
    """

    plans: tuple[RemovalPlan, ...]
    architecture: str | None
    arguments: dict[str, Any]
    data: str | None
    input: InputSpec
    validation: dict[str, Any] | None = None
    classes: tuple[str, ...] = ()


def save_slim(path: Path, model: nn.Module, header: SlimFile) -> None:
    """Write a slim network. Tensors that are mostly zeros are stored as their nonzeros and a bit mask."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in _state(model).items():
        if tensor.dim() and tensor.count_nonzero() < 0.8 * tensor.numel():
            mask = tensor.flatten() != 0
            tensors[name + MASK] = torch.from_numpy(np.packbits(mask.numpy()))
            tensors[name + VALUES] = tensor.flatten()[mask].contiguous()
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = tensor.contiguous()
    content = {
        "version": VERSION,
        "plans": [plan.to_json() for plan in header.plans],
        "architecture": header.architecture,
        "arguments": header.arguments,
        "data": header.data,
        "input": asdict(header.input),
        "validation": header.validation,
        "classes": list(header.classes),
        "sparse_shapes": shapes,
    }
    # One entry: safetensors writes several in random order, and equal runs should give equal files
    metadata = {FORMAT: json.dumps(content)}
    with replacing(path) as partial:
        partial.write_bytes(save(tensors, metadata))  # save_file would leave it unreadable to others


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict on the CPU, each shared tensor once, under its first name."""
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        memory = memory_of(tensor)
        if memory is None or memory not in seen:
            seen.add(memory)
            state[name] = tensor.detach().cpu()
    return state


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises LoadError where it is none, or damaged."""
    with _opened(path) as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def is_slim(path: Path) -> bool:
    """Whether a safetensors file says that it is a slim one. Raises LoadError as `read_safetensors` does."""
    with _opened(path) as file:
        return FORMAT in (file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise LoadError(f"file '{path}'", f"can't be read as safetensors: {error}") from error


def read_slim(path: Path) -> tuple[SlimFile, dict[str, Tensor]]:
    """Header and tensors of a slim file. Raises LoadError where it is none, or damaged."""
    where = f"file '{path}'"
    metadata, stored = read_safetensors(path)
    try:
        content = json.loads(metadata.get(FORMAT, "{}"))
        if content.get("version") != VERSION:
            found = f"version {content['version']}" if content else "of another kind"
            raise LoadError(where, f"is {found}, expected {FORMAT} version {VERSION}.")
        header = SlimFile(
            tuple(RemovalPlan.from_json(plan) for plan in content["plans"]),
            content["architecture"],
            content["arguments"],
            content["data"],
            InputSpec.from_json(content["input"]),
            content["validation"],
            tuple(str(name) for name in content.get("classes", ())),
        )
        return header, _unpack(stored, content["sparse_shapes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(where, f"has a malformed header: {error!r}.") from error


def _unpack(stored: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    packed = {name + suffix for name in shapes for suffix in (MASK, VALUES)}
    tensors = {name: tensor for name, tensor in stored.items() if name not in packed}
    for name, shape in shapes.items():
        values, mask = stored[name + VALUES], stored[name + MASK]
        size = math.prod(shape)
        if min(shape) < 0 or mask.dtype != torch.uint8 or mask.shape != (-(-size // 8),):
            raise ValueError(f"{name} is of {shape}, its mask of {list(mask.shape)} {mask.dtype}")
        kept = torch.from_numpy(np.unpackbits(mask.numpy(), count=size).astype(bool))
        if values.shape != (int(kept.sum()),):
            raise ValueError(
                f"{name} has {int(kept.sum())} nonzeros by its mask and {list(values.shape)} values"
            )
        dense = values.new_zeros(size)
        dense[kept] = values
        tensors[name] = dense.view(shape)
    return tensors


_WHICH = (
    "Pass the network as compress was given it, freshly built; where that was a slim one already: "
    "load_slim(path, model=load_slim(path_of_the_first, model=MyNetwork()))"
)


def load_slim(path: str | Path, model: nn.Module | ExportedProgram | None = None) -> nn.Module:
    """The slim network as a module that runs and trains on.

    Args:
        path: a slim.safetensors file.
        model: a freshly built original network, cut in place and taken out of wrappers for several
            devices, or the program that was compressed; None builds the architecture that the file names.
    Raises:
        LoadError: the file is damaged, names no architecture, or does not fit the network.
        ConvertError: the model is TorchScript, or no network at all.
    """
    header, tensors = read_slim(Path(path))
    if model is None:
        if header.architecture is None:
            raise LoadError(
                f"file '{path}'",
                "does not name its architecture: the network came as an object, or as a program.",
                "Pass a freshly built original, or the program: load_slim(path, model=MyNetwork())",
            )
        model = build_architecture(header.architecture, header.arguments, trusted=False)
    if isinstance(model, ExportedProgram):
        model = from_exported(model)
    model = unwrap(model)
    for plan in header.plans:
        apply_plan_(model, plan)
    state = model.state_dict()
    state.clear()  # what is left are the versions of its modules, which some ask for when they load
    state.update(tensors)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of shapes
        raise LoadError(f"file '{path}'", f"does not fit the network: {error}", _WHICH) from error
    tied = set(model.state_dict()) - set(_state(model))
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise LoadError(
            f"file '{path}'", f"does not fit the network: missing {missing}, not known {unexpected}.", _WHICH
        )
    return evaluated(model)
