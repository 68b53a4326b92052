"""8-bit execution: onnxruntime's own static quantisation, calibrated on training examples."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from vbdcompress.errors import ExportError
from vbdcompress.evaluation import Metric, mean_error
from vbdcompress.exporting.exporter import PRODUCER, graphs_of
from vbdcompress.exporting.onnx_file import open_session, run_session
from vbdcompress.exporting.preprocessing import inputs_for
from vbdcompress.files import Scratch, replacing
from vbdcompress.inputs import Inputs, tensors_of
from vbdcompress.records import InputSpec


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands batches of inputs to onnxruntime's calibration."""

    def __init__(self, names: list[str], batches: Iterable[Inputs]) -> None:
        self.batches = (
            dict(zip(names, (tensor.numpy() for tensor in tensors_of(batch)), strict=True))
            for batch in batches
        )

    def get_next(self) -> Any:
        return next(self.batches, None)


def quantize_int8(source: Path, target: Path, calibration: Iterable[Inputs]) -> None:
    """Write a file that computes in 8-bit integers, with a scale for each output of its weights.

    Args:
        source: ONNX file with dense float32 weights.
        target: of the file to write.
        calibration: batches of inputs, to find the range of every intermediate result on.
    Raises:
        ExportError: onnxruntime can't quantise it.
    """
    names = [item.name for item in open_session(source).get_inputs()]
    scratch = Scratch()
    prepared = scratch.folder / "prepared.onnx"
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends its own preprocessing, which was done
    try:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        with replacing(target) as partial:
            quantize_static(
                str(prepared),
                str(partial),
                _Reader(names, calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            _keep_used_operator_sets(partial)
    except Exception as error:  # onnxruntime's own derive from nothing narrower
        raise ExportError(f"int8 of '{source.name}'", f"onnxruntime can't quantise it: {error}") from error
    finally:
        root.setLevel(level)


def _keep_used_operator_sets(path: Path) -> None:
    """onnxruntime names all that it knows, and an older one refuses versions that it does not know."""
    proto = onnx.load(path)
    used = {node.domain for graph in graphs_of(proto) for node in graph.node} | {""}
    kept = [item for item in proto.opset_import if item.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    onnx.save(proto, path)


def write_properties(path: Path, properties: Mapping[str, str]) -> None:
    """What a file says of itself, in the place of what it said."""
    proto = onnx.load(path)
    proto.producer_name = PRODUCER
    proto.ClearField("producer_version")
    onnx.helper.set_model_props(proto, dict(properties))
    with replacing(path) as partial:
        onnx.save(proto, partial)


def measure_file_error(path: Path, batches: Iterable[Any], metric: Metric, spec: InputSpec) -> float:
    """Mean of a metric over a set in percent, of a file with one output, run by onnxruntime.

    Args:
        batches: (input, target), normalised.
        metric: (output, target) -> [batch] errors in [0, 1].
        spec: says whether the file takes pixels.
    """
    session = open_session(path)
    return mean_error(
        lambda inputs: torch.from_numpy(run_session(session, inputs_for(spec, inputs))[0]), batches, metric
    )


def first_batches(batches: Iterable[Any], examples: int) -> Iterator[Any]:
    """Inputs of the first batches, on the CPU, until there are as many examples."""
    seen = 0
    for inputs, _ in batches:
        if seen >= examples:
            return
        seen += len(tensors_of(inputs)[0])
        yield inputs.cpu() if isinstance(inputs, torch.Tensor) else inputs
