"""load: a trained network from a file, running no code from it unless told to."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import nn

from vbdcompress.architectures import build_architecture
from vbdcompress.errors import LoadError
from vbdcompress.exported import from_exported
from vbdcompress.exporting.slim_file import is_slim, load_slim, read_safetensors, read_slim
from vbdcompress.files import load_tensors, save_tensors
from vbdcompress.modes import evaluated
from vbdcompress.originals import unwrap
from vbdcompress.records import InputSpec
from vbdcompress.state_dicts import find_state_dict, load_state_
from vbdcompress.surgery.slice import RemovalPlan

FORMAT, VERSION = "vbdcompress.checkpoint", 1
# What a pickle's own code is known to raise where its classes changed, or lack what they need
_UNPICKLING_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    AttributeError,
    ImportError,
    ValueError,
    TypeError,
    LookupError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Loaded:
    """A network from a file, and what the file says of it.

    Attributes:
        model: in eval mode, on the CPU.
        architecture, arguments: how it is built; None where it came as an object.
        data: name of its data set; None where the file does not say.
        input: shape and normalisation; None where the file does not say.
        validation: {"fraction", "seed", "examples"} of the split that its training left out, and of how
            many; None where the file does not say, so the split may have been trained on.
        training: how it was trained, as the file says it.
        plans: of a slim file: what was removed from what the architecture builds.
        classes: names of its outputs, in their order; empty where the file does not say.
    """

    model: nn.Module
    architecture: str | None = None
    arguments: Mapping[str, Any] | None = None
    data: str | None = None
    input: InputSpec | None = None
    validation: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    plans: tuple[RemovalPlan, ...] = ()
    classes: tuple[str, ...] = ()


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    unsafe_pickle: bool = False,
) -> Loaded:
    """A network from a .pt, .pt2 or .safetensors file.

    Args:
        path: a checkpoint of `vbdcompress train`, a slim file, a bare state_dict (.pt or .safetensors; then
            `arch` is needed), or a torch.export program.
        arch: name of the architecture; see `build_architecture`. Overrides the file's.
        arguments: of the architecture's builder. Overrides the file's.
        unsafe_pickle: also read a whole pickled nn.Module or a program, which may run code from the
            file.
    Raises:
        LoadError: the file is missing, damaged, not safe, or does not fit its architecture.
    """
    path = Path(path)
    if path.is_dir():
        raise LoadError(f"file '{path}'", "is a folder.", "Name the file in it: .pt, .pt2 or .safetensors")
    if not path.is_file():
        raise LoadError(f"file '{path}'", "does not exist." + _nearest_file(path))
    if path.suffix == ".onnx":
        raise LoadError(
            f"file '{path}'",
            "is an ONNX file, which can't be trained.",
            "Give the PyTorch network that it was made from: .pt, .pt2 or .safetensors",
        )
    if path.suffix == ".safetensors" and is_slim(path):
        return _from_slim(path, arch, arguments)
    content: Any = (
        read_safetensors(path)[1] if path.suffix == ".safetensors" else _read_pt(path, unsafe_pickle)
    )
    if isinstance(content, nn.Module):
        return Loaded(evaluated(unwrap(content).cpu()))
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        return _from_checkpoint(path, content, arch, arguments)
    state = find_state_dict(path, content)
    if arch is None:
        raise LoadError(
            f"file '{path}'",
            f"holds {len(state)} tensors but does not name its architecture.",
            "Name it: --arch lenet5, torchvision:resnet18, package.module:function or file.py:function",
        )
    model = build_architecture(arch, arguments, trusted=True)
    load_state_(path, arch, model, state)
    return Loaded(evaluated(model), arch, dict(arguments or {}))


def _from_slim(path: Path, arch: str | None, arguments: Mapping[str, Any] | None) -> Loaded:
    header, _ = read_slim(path)
    name, given = arch or header.architecture, arguments or header.arguments or {}
    original = None if name is None else build_architecture(name, given, trusted=arch is not None)
    return Loaded(
        load_slim(path, original),
        name,
        given,
        header.data,
        header.input,
        header.validation,
        plans=header.plans,
        classes=header.classes,
    )


def save_checkpoint(path: Path, loaded: Loaded) -> None:
    """Write a checkpoint that names its architecture, data set, normalisation and validation split."""
    assert loaded.input is not None
    content = {
        "format": FORMAT,
        "version": VERSION,
        "arch": loaded.architecture,
        "arguments": dict(loaded.arguments or {}),
        "data": loaded.data,
        "input": {
            "name": loaded.input.name,
            "shape": list(loaded.input.shape),
            "mean": list(loaded.input.mean),
            "std": list(loaded.input.std),
        },
        "validation": dict(loaded.validation or {}),
        "classes": list(loaded.classes),
        "training": dict(loaded.training or {}),
        "state_dict": {name: tensor.cpu() for name, tensor in loaded.model.state_dict().items()},
    }
    save_tensors(path, content)


def _read_pt(path: Path, unsafe_pickle: bool) -> Any:
    where = f"file '{path}'"
    if path.suffix == ".pt2":
        return _read_exported(path, unsafe_pickle)
    if _is_torchscript(path):
        raise LoadError(
            where,
            "is TorchScript (torch.jit), whose layers can't be changed.",
            "Give a state_dict of the nn.Module that it was made from, or what torch.export makes of that.",
        )
    try:
        return load_tensors(path)
    except pickle.UnpicklingError as error:
        if unsafe_pickle:
            return _read_pickle(path)
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names '{found[1]}'" if found else str(error).splitlines()[0]
        raise LoadError(
            where,
            f"is a pickle that would run code when read ({what}); it was not read.",
            "Save a state_dict instead: torch.save(model.state_dict(), path). If you trust the file as "
            "you trust a program: --unsafe-pickle",
        ) from error


def _is_torchscript(path: Path) -> bool:
    """As torch.load tells it: by a record that torch.save never writes."""
    if not is_zipfile(path):
        return False
    try:
        with ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except BadZipFile:  # cut short: load_tensors says so
        return False


def _read_exported(path: Path, trusted: bool) -> nn.Module:
    where = f"file '{path}'"
    if not trusted:
        raise LoadError(
            where,
            "is a torch.export program, which can run code when read; it was not read.",
            "If you trust the file as you trust a program: --unsafe-pickle",
        )
    try:
        program = torch.export.load(path)
    except (OSError, BadZipFile, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise LoadError(where, f"is no torch.export program that this torch reads: {error}") from error
    return from_exported(program)


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except _UNPICKLING_ERRORS as error:
        raise LoadError(f"file '{path}'", f"can't be unpickled: {error}") from error


def _from_checkpoint(
    path: Path, content: Mapping[str, Any], arch: str | None, arguments: Mapping[str, Any] | None
) -> Loaded:
    where = f"file '{path}'"
    if content.get("version") != VERSION:
        raise LoadError(where, f"is checkpoint version {content.get('version')!r}, expected {VERSION}.")
    missing = [key for key in ("arch", "state_dict") if key not in content]
    if missing:
        raise LoadError(where, f"is a checkpoint without {', '.join(missing)}.")
    name, given = arch or content["arch"], arguments or content.get("arguments") or {}
    if not isinstance(content.get("data"), str | None):
        raise LoadError(where, f"names its data set {content['data']!r}, allowed is a name.")
    model = build_architecture(name, given, trusted=arch is not None)
    load_state_(path, name, model, content["state_dict"])
    try:
        spec = InputSpec.from_json(content["input"]) if content.get("input") else None
        split = content.get("validation") or None
        if split is not None:
            numbers = {"examples": int(split["examples"])} if "examples" in split else {}
            split = {"fraction": float(split["fraction"]), "seed": int(split["seed"]), **numbers}
        classes = tuple(str(name) for name in content.get("classes", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(
            where, f"has a malformed 'input', 'validation' or 'classes' entry: {error!r}."
        ) from error
    training = content.get("training") or None
    data = content.get("data")
    return Loaded(evaluated(model), name, given, data, spec, split, training, classes=classes)


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f" Did you mean '{folder / near[0]}'?" if near else ""
