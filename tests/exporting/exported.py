"""Exported files of each kind, for the runtimes that must take them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from vbdcompress.architectures import build_architecture
from vbdcompress.exporting.export import export
from vbdcompress.exporting.packing import Storage
from vbdcompress.exporting.preprocessing import to_pixels
from vbdcompress.records import InputSpec
from vbdcompress.rounding import round_weight, roundable, write_rounded_

# bits of the weights, all of them packed; whether the file takes pixels
CASES = [(32, False), (4, False), (8, True)]


def export_case(folder: Path, bits: int, embedded: bool) -> tuple[Any, Any]:
    """Write folder/model.onnx, a sparse network; an input of it, and its output in onnxruntime here."""
    torch.manual_seed(0)
    model = build_architecture("digits").eval()
    weights = roundable(model)
    for weight in weights.values():
        weight.tensor.data *= torch.rand_like(weight.tensor) < 0.2
    codes = {name: round_weight(weight, bits) for name, weight in weights.items()} if bits < 32 else {}
    write_rounded_(model, codes)
    samples = torch.randn(5, 1, 8, 8)
    spec = InputSpec((1, 8, 8), (0.3,), (0.4,), embedded=embedded)
    export(model, folder, samples, input=spec, storage=Storage(True, codes))
    given = (to_pixels(samples, spec) if embedded else samples).numpy()
    return given, run_here(folder / "model.onnx", given)


def run_here(path: Path, given: Any) -> Any:
    """The output in this Python's onnxruntime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: given})[0])
