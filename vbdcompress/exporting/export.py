"""export: the files of a finished network."""

from pathlib import Path

from torch import Tensor, nn

from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.slim_file import SlimFile, save_slim
from vbdcompress.records import ExportCheck


def export(model: nn.Module, folder: str | Path, samples: Tensor, header: SlimFile) -> ExportCheck:
    """Write model.onnx, checked against torch, and slim.safetensors into a folder.

    Args:
        model: plain and slim.
        folder: made where it is missing.
        samples: [n, ...] real inputs, normalised as in training.
        header: removal plans and origin, for `load_slim`.
    Raises:
        ExportError: see `export_onnx`; then neither file is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check = export_onnx(model, folder / "model.onnx", samples, input_name=header.input.name)
    save_slim(folder / "slim.safetensors", model, header)
    return check
