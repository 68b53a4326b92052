"""export: the files of a finished network."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from vbdcompress.errors import ExportError
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage
from vbdcompress.exporting.preprocessing import TakesPixels, inputs_for
from vbdcompress.exporting.slim_file import SlimFile, save_slim
from vbdcompress.inputs import Inputs, example_shape, names_of
from vbdcompress.records import ExportCheck, InputSpec
from vbdcompress.surgery.slice import RemovalPlan
from vbdcompress.vbd.posterior import find_posteriors
from vbdcompress.versions import version_of


def export(
    model: nn.Module,
    folder: str | Path,
    samples: Inputs,
    plans: Sequence[RemovalPlan] = (),
    *,
    others: Sequence[Inputs] = (),
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    data: str | None = None,
    input: InputSpec | None = None,
    validation: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    storage: Storage | None = None,
) -> ExportCheck:
    """Write model.onnx, checked against torch, and slim.safetensors into a folder.

    Args:
        model: plain and slim.
        folder: made where it is missing.
        samples: [n, ...] real inputs, normalised as in training.
        plans: removal plans, in the order in which they were applied: `load_slim` cuts by them.
        others: inputs of other shapes, which model.onnx takes as well: see `export_onnx`.
        architecture, arguments: how the original is built; without, `load_slim` must be given it.
        data: name of the data set.
        input: name, shape and normalisation of the inputs; None takes the samples' shape. Where it is
            embedded, model.onnx normalises by itself and takes pixels from 0 to 255.
        validation: {"fraction", "seed"} of the validation split, with "held_out": False where training may
            have seen it, and "examples" that were split.
        storage: see `export_onnx`.
    Raises:
        ExportError: see `export_onnx`, or the network has posteriors; then neither file is written.
    """
    folder = Path(folder)
    if find_posteriors(model):
        raise ExportError(
            "export",
            "the network is a converted one, from which nothing was removed.",
            "export(slim(converted).model, ...), or converted.undo() for the plain network",
        )
    make_folder(folder)
    spec = input or InputSpec(example_shape(samples))
    check = write_onnx(model, folder / "model.onnx", samples, spec, storage, others)
    header = SlimFile(
        tuple(plans),
        architecture,
        dict(arguments or {}),
        data,
        replace(spec, embedded=False),
        dict(validation) if validation else None,
        tuple(classes),
    )
    save_slim(folder / "slim.safetensors", model, header)
    return check


def make_folder(folder: Path) -> None:
    """Make a folder to write to. Raises ExportError where it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(
            f"export to '{folder}'", "is a file; allowed is a folder, made where it is missing."
        )
    folder.mkdir(parents=True, exist_ok=True)


def write_onnx(
    model: nn.Module,
    path: Path,
    samples: Inputs,
    spec: InputSpec,
    storage: Storage | None = None,
    others: Sequence[Inputs] = (),
) -> ExportCheck:
    """`export_onnx` of a network, behind its normalisation where that is embedded.

    Args:
        samples, others: [n, ...] real inputs, normalised as in training.
    """
    served = TakesPixels(model, spec) if spec.embedded else model
    given, *more = (inputs_for(spec, each) for each in (samples, *others))
    return export_onnx(served, path, given, input_name=spec.name, storage=storage, others=more)


def file_properties(
    spec: InputSpec,
    samples: Inputs,
    data: str | None,
    classes: Sequence[str],
    validation: Mapping[str, Any] | None,
    error: tuple[float, str],
) -> dict[str, str]:
    """What a model.onnx says of itself, for who has nothing else.

    Args:
        samples: some inputs: the first of several gives its name.
        validation: {"fraction", "seed"} of the validation split, with "held_out": False where training may
            have seen it, and "examples" that were split.
        error: in percent, and the name of the set.
    """
    told = {
        "made_by": f"vbdcompress {version_of('vbdcompress')}",
        "input": json.dumps(asdict(replace(spec, name=names_of(samples, spec.name)[0]))),
        "data": data,
        "classes": json.dumps(list(classes)) if classes else None,
        "validation": json.dumps(validation) if validation else None,
        "error": f"{error[0]:.2f} % on the {error[1]} set",
    }
    return {name: value for name, value in told.items() if value}
