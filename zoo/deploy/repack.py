"""Write model.onnx of a finished folder anew, packed: same weights, same error, fewer bytes.

    python zoo/deploy/repack.py exports/lenet5_weights zoo/lenet5.pt --data-root DATA

For folders of before there was packing; `vbdcompress run` packs by itself in weights mode.
"""

import tempfile
from pathlib import Path

import click

from vbdcompress import load_slim
from vbdcompress.data import load_data
from vbdcompress.exporting.latency import measure_latency
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage
from vbdcompress.loading import load
from vbdcompress.records import InputSpec
from vbdcompress.reporting.build import with_export
from vbdcompress.reporting.write import read_report, write_report

SAMPLES = 64


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("original", type=click.Path(path_type=Path))
@click.option("--data-root", required=True, envvar="VBDCOMPRESS_DATA", type=click.Path(path_type=Path))
def main(folder: Path, original: Path, data_root: Path) -> None:
    """Replace model.onnx and what report.json says of it."""
    content = read_report(folder)
    model = load_slim(folder / "slim.safetensors").eval()
    spec = InputSpec.from_json(content["input"])
    data = load_data(content["data"]["name"], data_root, normalisation=spec)
    samples = data.train.inputs[:SAMPLES]
    check = export_onnx(model, folder / "model.onnx", samples, input_name=spec.name, storage=Storage(True))
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "original.onnx"
        export_onnx(load(original).model, dense, samples, input_name=spec.name)
        latency = measure_latency((dense, samples), (folder / "model.onnx", samples))
    write_report(with_export(content, check, latency), folder)
    click.echo(f"{folder / 'model.onnx'}: {check.bytes:,} bytes")


if __name__ == "__main__":
    main()
