"""ONNX files that onnxruntime is seen to run as torch does."""

import copy
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn

from vbdcompress.compare import flatten_output, relative_difference
from vbdcompress.errors import ExportError
from vbdcompress.evaluation import without_autocast
from vbdcompress.exporting.exporter import CHECKER_ERRORS, TRACED, to_onnx
from vbdcompress.exporting.outputs import outputs_of
from vbdcompress.exporting.packing import FOLDED, Storage, pack_, rebuilding_graph
from vbdcompress.files import replacing
from vbdcompress.inputs import (
    Inputs,
    are_alike,
    call,
    in_eval_mode,
    map_tensors,
    open_dims,
    resize,
    shapes_of,
    tensors_of,
)
from vbdcompress.modes import evaluated
from vbdcompress.parametrized import store_weights_
from vbdcompress.records import ExportCheck, PackedTensor
from vbdcompress.rounding import Array, Rounded

# Largest |onnxruntime - torch| over the largest |torch|, float32 sums in another order
TOLERANCE = 1e-4
BATCH_SIZES = (1, 7)
# What onnxruntime says of operators that it has for other types
_OF_OTHER_TYPES = "NOT_IMPLEMENTED"
_DENSE_INSTEAD = "Please report the network; --no-pack writes the dense file."


@without_autocast()
def export_onnx(
    model: nn.Module,
    path: Path,
    samples: Inputs,
    *,
    input_name: str = "input",
    others: Sequence[Inputs] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    storage: Storage | None = None,
) -> ExportCheck:
    """Write a network as an ONNX file that onnxruntime is seen to run as torch does.

    Args:
        model: plain; exported in eval mode from a copy on the CPU.
        path: of the file; replaced in one step, and only by a file that passed.
        samples: [n, ...] real inputs, normalised as in training: a tensor, a tuple or a dict of them.
        input_name: of the graph's input; several are numbered behind it, and a dict's have their
            names. The first dimension is dynamic. The output is "output", several are called by their keys or
            fields, else "output_0" and so on; with a number behind it where an input is called that.
        others: more real inputs, of other shapes: the dimensions in which they differ from the samples are
            dynamic, too, and the file is compared on them as well.
        batch_sizes: to compare at.
        storage: whether weights are packed, and what the file says of itself; None: dense, nothing.
    Returns:
        what was checked and found.
    Raises:
        ExportError: the exporter or the checker refused the network, or the outputs differ. No
            file is left then, and one that stood there before stays.
    """
    storage = storage or Storage()
    # The exporter replays attention as it runs without gradients, and trips where the traced kernel differs
    plain = evaluated(copy.deepcopy(model).cpu()).requires_grad_(False)
    # ONNX has no operators for what computes some of them
    store_weights_(plain)
    shown = [map_tensors(each, lambda tensor: tensor.detach().cpu()) for each in (samples, *others)]
    if not are_alike(shown):
        told = ", ".join(str(shapes_of(each)) for each in shown)
        raise ExportError(
            "export", f"inputs have shapes {told}; allowed are as many, of as many dimensions, in all."
        )
    with replacing(path) as partial:
        try:
            proto, packed = _write(plain, shown, input_name, storage, partial, strict=False)
            difference = compare_with_torch(plain, partial, shown, batch_sizes)
        except ExportError as error:
            try:
                proto, packed = _write(plain, shown, input_name, storage, partial, strict=True)
                difference = compare_with_torch(plain, partial, shown, batch_sizes)
            except (ExportError, AssertionError):  # what torch's strict tracing raises, beside what is known
                raise error from None
        if not difference <= TOLERANCE:
            raise ExportError(
                f"export to '{path.name}'",
                f"onnxruntime differs from torch by {difference:.2g} of the largest output, "
                f"allowed is {TOLERANCE:.2g}; the file is not kept.",
                "Please report the network; until then result.model serves in torch.",
            )
        size = partial.stat().st_size
    opset = int(next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")))
    sizes = tuple(tuple(dims) for dims in open_dims(shown))
    checked = tuple(batch_sizes)
    return ExportCheck(opset, size, checked, difference, TOLERANCE, packed, sizes, outputs_of(proto))


def _write(
    model: nn.Module, shown: Sequence[Inputs], input_name: str, storage: Storage, path: Path, *, strict: bool
) -> tuple[onnx.ModelProto, tuple[PackedTensor, ...]]:
    proto = to_onnx(model, shown, input_name, strict=strict)
    onnx.helper.set_model_props(proto, {str(key): str(value) for key, value in storage.metadata.items()})
    packed = _pack_and_check_(proto, storage.rounded) if storage.pack else ()
    onnx.save(proto, path)
    return proto, packed


def _pack_and_check_(proto: onnx.ModelProto, rounded: Mapping[str, Rounded]) -> tuple[PackedTensor, ...]:
    """Pack, and see onnxruntime rebuild each weight: to the last bit, or as close as its row says."""
    dense = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    rows = pack_(proto, rounded)
    if rows:
        try:
            onnx.checker.check_model(proto, full_check=True)
        except CHECKER_ERRORS as error:
            raise ExportError(
                "export", f"the graph with packed weights is not valid: {error}", _DENSE_INSTEAD
            ) from error
        session = open_session(rebuilding_graph(proto, rows).SerializeToString())
        for row, found in zip(rows, session.run(None, {}), strict=True):
            wanted = dense[row.name]
            largest = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
            allowed = 0.0 if row.exact else FOLDED * largest
            difference = _largest_difference(np.asarray(found), wanted)
            if not difference <= allowed:
                raise ExportError(
                    "export",
                    f"weight '{row.name}' as onnxruntime rebuilds it differs from the network's by "
                    f"{difference:.2g}; the file is not kept.",
                    _DENSE_INSTEAD,
                )
    return rows


def _largest_difference(found: Array, wanted: Array) -> float:
    """0 where both hold the same infinity, as a mask may, or NaN."""
    different = ~((found == wanted) | (np.isnan(found) & np.isnan(wanted)))
    return float(np.abs(found[different] - wanted[different]).max(initial=0.0))


def open_session(file: Path | bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU of a file, or of what stands in one; threads 0 takes all cores.

    Raises:
        ExportError: onnxruntime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told once
    options.intra_op_num_threads = threads
    try:
        source = file if isinstance(file, bytes) else str(file)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not importable by name
        name = "the exported graph" if isinstance(file, bytes) else f"file '{file}'"
        advice = "Some operators it has in single precision alone: model.float()"
        told = f"onnxruntime can't load it: {error}"
        raise ExportError(name, told, advice if _OF_OTHER_TYPES in str(error) else "") from error


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


def _runs(session: onnxruntime.InferenceSession, inputs: Inputs) -> bool:
    try:
        run_session(session, inputs)
    except ExportError:
        return False
    return True


def compare_with_torch(
    model: nn.Module, path: Path, shown: Sequence[Inputs], batch_sizes: Sequence[int] = BATCH_SIZES
) -> float:
    """Largest difference of onnxruntime from torch, relative to the largest output of a batch.

    Args:
        shown: inputs, one after the other, each in all batch sizes.
    """
    session = open_session(path)
    worst = 0.0
    for samples, size in product(shown, batch_sizes):
        batch = resize(samples, size)
        with in_eval_mode(model), torch.no_grad():
            expected = flatten_output(call(model, batch))
        try:
            outputs = run_session(session, batch)
        except ExportError as error:
            if size == TRACED or not _runs(session, resize(samples, TRACED)):
                raise
            raise ExportError(
                "export",
                f"the file takes batches of {TRACED} alone, with which it was traced: {error}",
                "Its code makes a plain number of the batch, as len(x.tolist()) does; x.shape[0] does not.",
            ) from error
        found = [torch.from_numpy(np.asarray(output)) for output in outputs]
        worst = max(worst, relative_difference(expected, found))
    return worst
