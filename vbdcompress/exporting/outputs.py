"""What a file says of its outputs: names that tell several apart, and sizes that follow the inputs'."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain, count
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from vbdcompress.compare import flatten_output
from vbdcompress.inputs import Inputs, call, tensors_of
from vbdcompress.records import OutputRow

OUTPUT = "output"


def names_of_outputs(output: Any, taken: Collection[str]) -> list[str]:
    """A name for each tensor in a network's output: its key or field, else "output" or "output_0" and so on.

    Args:
        taken: names of the inputs: an output that has one of these gets a number behind it.
    """
    paths = list(_paths(output, ()))
    alone = len(paths) == 1 and not any(isinstance(part, str) for part in paths[0])
    found: list[str] = []
    for path in paths:
        parts = path if path and isinstance(path[0], str) else (OUTPUT, *(() if alone else path))
        wanted = "_".join(map(str, parts)) or OUTPUT
        free = (name for name in chain([wanted], map(f"{wanted}_{{}}".format, count(1))))
        found.append(next(name for name in free if name not in taken and name not in found))
    return found


def _paths(output: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Keys, fields and places on the way to each tensor, in the order of `flatten_output`."""
    if isinstance(output, Tensor):
        yield path
        return
    if isinstance(output, Mapping):
        items: Any = [(str(key), item) for key, item in output.items()]
    elif is_dataclass(output) and not isinstance(output, type):
        items = [(item.name, getattr(output, item.name)) for item in fields(output)]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = zip(output._fields, output, strict=True)
    elif isinstance(output, str | bytes) or not hasattr(output, "__iter__"):
        return
    else:
        items = enumerate(output)
    for key, item in items:
        yield from _paths(item, (*path, key))


def outputs_of(proto: onnx.ModelProto) -> tuple[OutputRow, ...]:
    """What a file says that it gives."""
    types = [(value.name, value.type.tensor_type) for value in proto.graph.output]
    return tuple(
        OutputRow(
            name,
            tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim),
            onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
        )
        for name, kind in types
    )


@torch.no_grad()
def open_output_sizes_(proto: onnx.ModelProto, model: nn.Module, shown: Sequence[Inputs]) -> None:
    """Leave each size of an output open that is not the same for all inputs, in place.

    torch writes down the length that it traced recurrent layers with, though the file takes any. A size that
    follows one of the inputs' has its name.

    Args:
        model: in eval mode.
        shown: inputs of all shapes.
    """
    outputs = [[tuple(tensor.shape) for tensor in flatten_output(call(model, each))] for each in shown]
    given = {
        dim.dim_param: [tensors_of(each)[number].shape[place] for each in shown]
        for number, value in enumerate(proto.graph.input)
        for place, dim in enumerate(value.type.tensor_type.shape.dim)
        if dim.dim_param
    }
    unnamed = (f"{OUTPUT}_size_{number}" for number in count(1))
    for number, value in enumerate(proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        if {len(shapes[number]) for shapes in outputs} != {len(dims)}:
            continue
        for place, dim in enumerate(dims):
            sizes = [shapes[number][place] for shapes in outputs]
            if dim.HasField("dim_value") and set(sizes) != {dim.dim_value}:
                followed = next((name for name, own in given.items() if own == sizes), None)
                dim.dim_param = followed or next(unnamed)
