"""export: the files of a finished network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage
from vbdcompress.exporting.preprocessing import TakesPixels, to_pixels
from vbdcompress.exporting.slim_file import SlimFile, save_slim
from vbdcompress.inputs import Inputs, example_shape
from vbdcompress.records import ExportCheck, InputSpec
from vbdcompress.surgery.slice import RemovalPlan


def export(
    model: nn.Module,
    folder: str | Path,
    samples: Inputs,
    plans: Sequence[RemovalPlan] = (),
    *,
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    data: str | None = None,
    input: InputSpec | None = None,
    validation: Mapping[str, Any] | None = None,
    storage: Storage | None = None,
) -> ExportCheck:
    """Write model.onnx, checked against torch, and slim.safetensors into a folder.

    Args:
        model: plain and slim.
        folder: made where it is missing.
        samples: [n, ...] real inputs, normalised as in training.
        plans: removal plans, in the order in which they were applied: `load_slim` cuts by them.
        architecture, arguments: how the original is built; without, `load_slim` must be given it.
        data: name of the data set.
        input: name, shape and normalisation of the inputs; None takes the samples' shape. Where it is
            embedded, model.onnx normalises by itself and takes pixels from 0 to 255.
        validation: {"fraction", "seed"} of the split that was held out.
        storage: see `export_onnx`.
    Raises:
        ExportError: see `export_onnx`; then neither file is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = input or InputSpec(example_shape(samples))
    served, given = model, samples
    if spec.embedded:
        served, given = TakesPixels(model, spec), to_pixels(samples, spec)
    check = export_onnx(
        served,
        folder / "model.onnx",
        given,
        input_name=spec.name,
        storage=storage,
    )
    header = SlimFile(
        tuple(plans),
        architecture,
        dict(arguments or {}),
        data,
        replace(spec, embedded=False),
        dict(validation) if validation else None,
    )
    save_slim(folder / "slim.safetensors", model, header)
    return check
