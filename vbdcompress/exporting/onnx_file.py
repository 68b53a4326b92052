"""ONNX by torch's dynamo exporter, checked, cleaned, and compared with torch in onnxruntime."""

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from vbdcompress.errors import ExportError
from vbdcompress.files import replacing
from vbdcompress.inputs import Inputs, call, in_eval_mode, map_tensors, resize, shapes_of, tensors_of
from vbdcompress.records import ExportCheck
from vbdcompress.surgery.verify import flatten_output, relative_difference

# Largest |onnxruntime - torch| over the largest |torch|, float32 sums in another order
TOLERANCE = 1e-4
BATCH_SIZES = (1, 7)
# What the exporter and the checker are known to raise for networks that ONNX can't express
_EXPORT_ERRORS = (
    torch.onnx.errors.OnnxExporterError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
)


def export_onnx(
    model: nn.Module,
    path: Path,
    samples: Inputs,
    *,
    input_name: str = "input",
    tolerance: float = TOLERANCE,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> ExportCheck:
    """Write a network as an ONNX file that onnxruntime is seen to run as torch does.

    Args:
        model: plain; exported in eval mode from a copy on the CPU.
        path: of the file; replaced in one step, and only by a file that passed.
        samples: [n, ...] real inputs, normalised as in training: a tensor, a tuple or a dict of them.
        input_name: of the graph's input; several are numbered behind it, and a dict's have their
            names. The first dimension is dynamic. The output is "output".
        tolerance: for the largest difference, relative to the largest output.
        batch_sizes: to compare at.
    Returns:
        what was checked and found.
    Raises:
        ExportError: the exporter or the checker refused the network, or the outputs differ. No
            file is left then, and one that stood there before stays.
    """
    plain = copy.deepcopy(model).cpu().eval()
    samples = map_tensors(samples, lambda tensor: tensor.detach().cpu())
    with replacing(path) as partial:
        opset = _write_checked(plain, partial, samples, input_name)
        difference = compare_with_torch(plain, partial, samples, batch_sizes)
        if not difference <= tolerance:
            raise ExportError(
                f"export to '{path.name}'",
                f"onnxruntime differs from torch by {difference:.2g} of the largest output, "
                f"allowed is {tolerance:.2g}; the file is not kept.",
                "Please report the network; until then result.model serves in torch.",
            )
        size = partial.stat().st_size
    return ExportCheck(opset, size, tuple(batch_sizes), difference, tolerance)


def _write_checked(model: nn.Module, path: Path, samples: Inputs, input_name: str) -> int:
    """Export, clean and check; returns the opset."""
    tensors = tensors_of(resize(samples, 2))
    batch = torch.export.Dim("batch")
    try:
        with in_eval_mode(model), _quiet_exporter():
            program: Any = torch.onnx.export(
                model if isinstance(samples, Tensor) else _Positional(model, samples),
                tuple(tensors),
                dynamo=True,
                input_names=_input_names(samples, input_name),
                output_names=["output"],
                dynamic_shapes=(({0: batch},) * len(tensors),)
                if not isinstance(samples, Tensor)
                else ({0: batch},),
                external_data=False,
                optimize=True,
                verbose=False,
            )
        proto = program.model_proto
        _strip_metadata(proto)
        onnx.checker.check_model(proto, full_check=True)
    except _EXPORT_ERRORS as error:
        raise ExportError(
            f"export of {type(model).__name__}", f"ONNX refused it: {type(error).__name__}: {error}"
        ) from error
    onnx.save(proto, path)
    return int(next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")))


class _Positional(nn.Module):
    """A network that takes several inputs, called with their tensors one after the other."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        return call(self.model, map_tensors(self.inputs, lambda _: next(given)))


def _input_names(samples: Inputs, name: str) -> list[str]:
    if isinstance(samples, Mapping) and all(isinstance(item, Tensor) for item in samples.values()):
        return [str(key) for key in samples]
    count = len(tensors_of(samples))
    return [name] if count == 1 else [f"{name}_{number}" for number in range(count)]


def _strip_metadata(proto: onnx.ModelProto) -> None:
    """The exporter notes stack traces with the machine's paths on every node and value."""
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
            item.ClearField("metadata_props")
            item.ClearField("doc_string")
        graph.ClearField("metadata_props")
        graph.ClearField("doc_string")
        graphs += [
            attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")
        ]
    for function in proto.functions:
        function.ClearField("metadata_props")
        function.ClearField("doc_string")
        for node in function.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    proto.producer_name = "vbdcompress"
    proto.ClearField("producer_version")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's progress, notes on its own deprecations and log lines."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU; threads 0 takes all cores. Raises ExportError for a bad file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not importable by name
        raise ExportError(f"file '{path}'", f"onnxruntime can't load it: {error}") from error


def run_session(session: onnxruntime.InferenceSession, inputs: Inputs) -> list[Any]:
    """All outputs of a session, given torch's inputs."""
    arrays = [tensor.numpy() for tensor in tensors_of(inputs)]
    names = [item.name for item in session.get_inputs()]
    try:
        outputs: list[Any] = session.run(None, dict(zip(names, arrays, strict=True)))
    except Exception as error:  # as above
        shapes = ", ".join(map(str, shapes_of(inputs)))
        raise ExportError("onnxruntime", f"fails on inputs of shape {shapes}: {error}") from error
    return outputs


def compare_with_torch(
    model: nn.Module, path: Path, samples: Inputs, batch_sizes: Sequence[int] = BATCH_SIZES
) -> float:
    """Largest difference of onnxruntime from torch over the batch sizes, relative to the largest output."""
    session = open_session(path)
    worst = 0.0
    for size in batch_sizes:
        batch = resize(samples, size)
        with in_eval_mode(model), torch.no_grad():
            expected = flatten_output(call(model, batch))
        found = [torch.from_numpy(np.asarray(output)) for output in run_session(session, batch)]
        worst = max(worst, relative_difference(expected, found))
    return worst
