"""What a run gives: the slim network, its report, and the files that they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vbdcompress.config import RunConfig
from vbdcompress.data.loaders import drawn_from, kept_generators, seed_generators
from vbdcompress.errors import DataError, ExportError
from vbdcompress.evaluation import Metric
from vbdcompress.exporting.export import export, file_properties, make_folder, write_onnx
from vbdcompress.exporting.int8 import (
    first_batches,
    measure_file_error,
    quantize_int8,
    write_properties,
)
from vbdcompress.exporting.latency import measure_latency
from vbdcompress.exporting.packing import Storage
from vbdcompress.exporting.preprocessing import inputs_for
from vbdcompress.files import Scratch, replacing_files
from vbdcompress.inputs import Inputs
from vbdcompress.precision import Rounding
from vbdcompress.records import InputSpec
from vbdcompress.reporting.build import with_export
from vbdcompress.reporting.write import write_report
from vbdcompress.sources import Sources
from vbdcompress.stages import Origin
from vbdcompress.surgery.slice import RemovalPlan

ORIGINAL_FILE = "original.onnx"
INT8_FILE = "model_int8.onnx"
CALIBRATION_EXAMPLES = 512


@dataclass(frozen=True)
class ResultFiles:
    """What the files of a result hold beside the network.

    Attributes:
        scratch: folder with the original's ONNX file, to compare with; gone when this object is.
        plans: removal plans in order, from what the architecture builds to the slim network.
        samples: the first inputs of the training loader, what the files are checked on.
        others: inputs of other shapes, on which they are checked as well.
        origin: where the network came from.
        sources: the data.
        config: the options.
        metric: how outputs are judged.
        rounding: the codes of rounded weights; None where they were not.
    """

    scratch: Scratch
    plans: tuple[RemovalPlan, ...]
    samples: Inputs
    others: Sequence[Inputs]
    origin: Origin
    sources: Sources
    config: RunConfig
    metric: Metric
    rounding: Rounding | None


@dataclass(frozen=True)
class Result:
    """What `compress` gives.

    Attributes:
        model: slim, an ordinary nn.Module in eval mode.
        report: the content of report.json; export and latency are null until `export`.
        original: the network that came in, for comparison.
        sigma: parameter -> posterior standard deviation of each of its weights; empty in channels mode.
        files: what `export` writes beside the network.
        is_main: False in all but one of several processes: only the main one should write.
    """

    model: nn.Module
    report: dict[str, Any]
    original: nn.Module
    sigma: dict[str, torch.Tensor]
    files: ResultFiles
    is_main: bool

    def __repr__(self) -> str:
        ratio = self.report["size"]["compression_ratio"]
        fewer = ", ".join(f"{ratio[key]:.3g}x fewer {key}" for key in ("nonzeros", "parameters", "macs"))
        return f"Result({fewer}; {self.report['error_split']} error {self.report['error']:.2f} %)"

    def export(self, folder: str | Path) -> dict[str, Any]:
        """Write model.onnx, slim.safetensors, report.json and report.html; returns the full report.

        All are there together, or, where it fails, what was there before. Where --int8's file can't be
        made, the report says so.

        Raises:
            ExportError: the ONNX file does not equal the network; it is not kept.
        """
        folder = Path(folder)
        make_folder(folder)
        with replacing_files(folder) as new:
            content = self._write(new)
            (folder / INT8_FILE).unlink(missing_ok=True)  # of an earlier run: it would be another network's
        self.report.update(content)
        return content

    def _write(self, folder: Path) -> dict[str, Any]:
        files, origin, sources = self.files, self.files.origin, self.files.sources
        spec = sources.input
        check = export(
            self.model,
            folder,
            files.samples,
            files.plans,
            others=files.others,
            architecture=origin.architecture,
            arguments=origin.arguments,
            data=sources.record.name,
            input=spec,
            validation=sources.record.split,
            classes=sources.record.classes,
            storage=Storage(
                files.config.packs,
                {} if files.rounding is None else files.rounding.codes,
                self._properties(self.report["error"]),
            ),
        )
        given = inputs_for(spec, files.samples)
        original = files.scratch.folder / ORIGINAL_FILE
        if spec.embedded:  # to compare with, a file that has the same work to do
            original = original.with_name("original_of_pixels.onnx")
            write_onnx(self.original, original, files.samples, spec, others=files.others)
        latency = measure_latency((original, given), (folder / "model.onnx", given))
        content = with_export(self.report, check, latency)
        if files.config.int8:
            try:
                parts = files.sources
                with kept_generators(parts.train, parts.validation, parts.test):
                    content["int8"] = self._export_int8(folder, spec, given)
                content["files"] = [*content["files"][:1], INT8_FILE, *content["files"][1:]]
            except (ExportError, DataError) as error:
                (folder / INT8_FILE).unlink(missing_ok=True)
                told = f"There is no {INT8_FILE}: {error}"
                if told not in content["warnings"]:  # of an earlier export of the same result
                    content["warnings"] = [*content["warnings"], told]
        write_report(content, folder)
        return content

    def _properties(self, error: float) -> dict[str, str]:
        """What a file says of itself, of this error in percent."""
        files, record = self.files, self.files.sources.record
        told = (error, self.report["error_split"])
        return file_properties(
            files.sources.input, files.samples, record.name, record.classes, record.split, told
        )

    def _export_int8(self, folder: Path, spec: InputSpec, given: Inputs) -> dict[str, Any]:
        """Write model_int8.onnx; its bytes, errors, and latency beside model.onnx."""
        files, sources = self.files, self.files.sources
        source = folder / "model.onnx"
        if files.config.packs:  # what is rebuilt at session time is no constant to quantise
            source = files.scratch.folder / "dense.onnx"
            write_onnx(self.model, source, files.samples, spec, others=files.others)
        path, seed = folder / INT8_FILE, files.config.seed
        with drawn_from(seed):  # the same examples at each export
            seed_generators(sources.train, seed)
            batches = first_batches(sources.train, CALIBRATION_EXAMPLES)
            quantize_int8(source, path, (inputs_for(spec, inputs) for inputs in batches))
        sets = {"validation": sources.validation, "test": sources.test}
        errors = {
            name: measure_file_error(path, batches, files.metric, spec)
            for name, batches in sets.items()
            if batches is not None
        }
        write_properties(path, self._properties(errors[self.report["error_split"]]))
        return {
            "bytes": path.stat().st_size,
            "errors": errors,
            "latency": [
                {"batch": row.batch, "float_ms": row.original_ms, "int8_ms": row.slim_ms, "calls": row.calls}
                for row in measure_latency((folder / "model.onnx", given), (path, given))
            ],
        }
