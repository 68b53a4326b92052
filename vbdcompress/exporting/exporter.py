"""A network as an ONNX graph, by torch's dynamo exporter, cleaned and checked."""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import count
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from vbdcompress.compare import flatten_output
from vbdcompress.errors import ExportError, words_of
from vbdcompress.exporting.outputs import names_of_outputs, open_output_sizes_
from vbdcompress.inputs import (
    Inputs,
    call,
    in_eval_mode,
    map_tensors,
    names_of,
    open_dims,
    resize,
    tensors_of,
)

# torch tells a batch of one apart as it traces
TRACED = 2
# What the checker is known to raise
CHECKER_ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
# What the exporter and the checker are known to raise for networks that ONNX can't express
_EXPORT_ERRORS = (
    torch.onnx.errors.OnnxExporterError,
    *CHECKER_ERRORS,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
)
_PARTS = ("", ".onnx", ".export", "._export", "._guards", "._dynamo", ".fx")
_LOGGERS = (*(f"torch{part}" for part in _PARTS), "onnxscript", "onnx_ir")
PRODUCER = "vbdcompress"
# How torch calls a size that it left open
_SYMBOL = re.compile(r"\bs\d+\b")


def to_onnx(
    model: nn.Module, shown: Sequence[Inputs], input_name: str, *, strict: bool = False
) -> onnx.ModelProto:
    """Export, clean and check.

    Args:
        model: on the CPU, without gradients.
        shown: inputs, traced with the first that torch can; those of other shapes say which dimensions
            beside the batch are dynamic.
        input_name: of the graph's input; see `export_onnx`.
        strict: trace the network's code as written, not as it runs: that follows len(x), but takes less.
    Raises:
        ExportError: the exporter or the checker refuses the network.
    """
    sizes = open_dims(shown)
    samples = next((each for each in shown if _can_be_traced(each, sizes)), shown[0])
    two = resize(samples, TRACED)
    tensors = tensors_of(two)
    names = names_of(samples, input_name)
    # torch 2.8 insists on the bound; the file knows none
    batch = {0: torch.export.Dim("batch", min=2)}
    shapes: tuple[Any, ...] = tuple(
        batch | dict.fromkeys(dims, torch.export.Dim.AUTO) if tensor.dim() else {}
        for tensor, dims in zip(tensors, sizes, strict=True)
    )
    try:
        with in_eval_mode(model), _quiet_exporter(), _without_a_look_at_masks():
            with torch.no_grad():
                output = call(model, resize(samples, TRACED + 1))
            output_names = names_of_outputs(output, names)
            bare = isinstance(two, Tensor) and isinstance(output, Tensor)
            module: Any = model if bare else _OfTensors(model, samples)
            dynamic: Any = shapes if bare else (shapes,)
            if strict:
                module = torch.export.export(module, tuple(tensors), dynamic_shapes=dynamic, strict=True)
            program: Any = torch.onnx.export(
                module,
                tuple(tensors),
                dynamo=True,
                input_names=[f"given.{place}" for place in range(len(names))],
                output_names=[f"found.{place}" for place in range(len(output_names))],
                dynamic_shapes=dynamic,
                external_data=False,
                optimize=True,
                verbose=False,
            )
        proto: onnx.ModelProto = program.model_proto
        _strip_metadata(proto)
        _name_values(proto, names, output_names)
        _name_sizes(proto)
        with in_eval_mode(model):
            open_output_sizes_(proto, model, [*shown, two, resize(samples, TRACED + 1)])
        # older runtimes refuse a newer number, whatever stands in the file
        proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
        onnx.checker.check_model(proto, full_check=True)
    except _EXPORT_ERRORS as error:
        raise ExportError(f"export of {type(model).__name__}", f"ONNX refused it: {_cause(error)}") from error
    del proto.graph.value_info[:]  # of intermediate results: every runtime infers it anew
    return proto


def _can_be_traced(inputs: Inputs, sizes: Sequence[Sequence[int]]) -> bool:
    """Whether the open dimensions are sizes that torch does not take for constants, as it does 0 and 1."""
    return all(
        tensor.shape[dim] >= TRACED
        for tensor, dims in zip(tensors_of(inputs), sizes, strict=True)
        for dim in dims
    )


def _name_values(proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Call inputs and outputs so. A value of the graph that has such a name ("linear") gets another."""
    graphs = graphs_of(proto)
    nodes = [node for graph in graphs for node in graph.node]
    taken = {name for node in nodes for name in node.output} | {
        item.name for graph in graphs for item in graph.initializer
    }
    names = [*inputs, *outputs]
    ends = (item.name for item in (*proto.graph.input, *proto.graph.output))
    new = dict(zip(ends, names, strict=True))
    for name in sorted(taken & set(names)):
        new[name] = next(
            free for free in map(f"{name}_{{}}".format, count(1)) if free not in taken and free not in names
        )
        taken.add(new[name])
    for node in nodes:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for graph in graphs:
        for item in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            item.name = new.get(item.name, item.name)


def graphs_of(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    """The graph, and those inside its conditions and loops."""
    found = [proto.graph]
    for graph in found:  # it grows meanwhile
        parts = [part for node in graph.node for part in node.attribute]
        found += [part.g for part in parts if part.HasField("g")]
    return found


def _name_sizes(proto: onnx.ModelProto) -> None:
    """Call open dimensions `size`, or `size_1` and so on: torch's own names (s27) change from run to run."""
    values = [*proto.graph.input, *proto.graph.output]
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    found = dict.fromkeys(symbol for dim in dims for symbol in _SYMBOL.findall(dim.dim_param))
    names = {old: "size" if len(found) == 1 else f"size_{place}" for place, old in enumerate(found, 1)}
    for dim in dims:
        dim.dim_param = _SYMBOL.sub(lambda match: names[match.group()], dim.dim_param)


def _cause(error: BaseException) -> str:
    """What the exporter stumbled over, without its own advice to its developers."""
    while isinstance(error, torch.onnx.errors.OnnxExporterError) and error.__cause__ is not None:
        error = error.__cause__
    return words_of(error)


class _OfTensors(nn.Module):
    """A network called with the tensors of its inputs one after the other, that gives those of its output.

    The exporter knows no output of a class of the user's own, such as a dataclass.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        return tuple(flatten_output(call(self.model, map_tensors(self.inputs, lambda _: next(given)))))


def _strip_metadata(proto: onnx.ModelProto) -> None:
    """The exporter notes stack traces with the machine's paths on every node and value."""
    for graph in graphs_of(proto):
        for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
            item.ClearField("metadata_props")
            item.ClearField("doc_string")
        graph.ClearField("metadata_props")
        graph.ClearField("doc_string")
    for function in proto.functions:
        function.ClearField("metadata_props")
        function.ClearField("doc_string")
        for node in function.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    proto.producer_name = PRODUCER
    proto.ClearField("producer_version")


@contextmanager
def _without_a_look_at_masks() -> Iterator[None]:
    """torch's transformers compare their mask with the causal one, for a hint that no file can hold."""
    before = transformer._detect_is_causal_mask

    def as_told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    transformer._detect_is_causal_mask = as_told
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's progress, notes on its own deprecations and log lines."""
    # What fails is raised; torch logs it too, with pages of its graph
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
