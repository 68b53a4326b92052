"""compress: the whole way, a line a stage."""

import copy
import json
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.export import ExportedProgram

from vbdcompress.config import RunConfig, make_config
from vbdcompress.conversion import check_model
from vbdcompress.count import FLOAT_BYTES, measure_size
from vbdcompress.data import Unpack, Unpacked, count_examples, split_loader
from vbdcompress.devices import start_fabric
from vbdcompress.errors import ConfigError
from vbdcompress.evaluation import Loss, Metric, cross_entropy, to_device, top1_error
from vbdcompress.exported import from_exported
from vbdcompress.exporting.export import export
from vbdcompress.exporting.int8 import first_batches, measure_file_error, quantize_int8
from vbdcompress.exporting.latency import measure_latency
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.preprocessing import TakesPixels, to_pixels
from vbdcompress.files import Scratch
from vbdcompress.inputs import Inputs, call, example_shape, first
from vbdcompress.precision import Rounding
from vbdcompress.progress import FitProgress
from vbdcompress.records import InputSpec, Size
from vbdcompress.reporting.build import DataRecord, ReportContext, report, with_export
from vbdcompress.reporting.write import write_report
from vbdcompress.sources import Sources, check_labels, first_inputs, warnings_of
from vbdcompress.stages import Judge, Origin, StageResult, StageRunner
from vbdcompress.surgery.slice import RemovalPlan
from vbdcompress.surgery.verify import flatten_output
from vbdcompress.training import Listener
from vbdcompress.workplace import Workplace, identify_run

SAMPLES = 64
ORIGINAL_FILE = "original.onnx"
INT8_FILE = "model_int8.onnx"
CALIBRATION_EXAMPLES = 512


@dataclass(frozen=True)
class _Files:
    """What the files of a result hold beside the network.

    Attributes:
        scratch: folder with the original's ONNX file, to compare with; gone when this object is.
        plans: removal plans, one a stage.
        samples: the first inputs of the training loader, what the files are checked on.
        origin: where the network came from.
        sources: the data.
        config: the options.
        metric: how outputs are judged.
        rounding: the codes of rounded weights; None where they were not.
    """

    scratch: Scratch
    plans: tuple[RemovalPlan, ...]
    samples: Inputs
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
    files: _Files
    is_main: bool

    def __repr__(self) -> str:
        ratio = self.report["size"]["compression_ratio"]
        fewer = ", ".join(f"{ratio[key]:.3g}x fewer {key}" for key in ("nonzeros", "parameters", "macs"))
        return f"Result({fewer}; {self.report['error_split']} error {self.report['error']:.2f} %)"

    def export(self, folder: str | Path) -> dict[str, Any]:
        """Write model.onnx, slim.safetensors, report.json and report.html; returns the full report.

        Raises:
            ExportError: the ONNX file does not equal the network; it is not kept.
        """
        folder = Path(folder)
        files, origin, sources = self.files, self.files.origin, self.files.sources
        spec = replace(sources.input, embedded=files.config.embed_preprocessing)
        check = export(
            self.model,
            folder,
            files.samples,
            files.plans,
            architecture=origin.architecture,
            arguments=origin.arguments,
            data=sources.record.name,
            input=spec,
            validation=sources.record.split,
            pack=files.config.packs,
            rounded=None if files.rounding is None else files.rounding.codes,
            metadata=_metadata(self.report, spec),
        )
        given = to_pixels(files.samples, spec) if spec.embedded else files.samples
        latency = measure_latency(
            (files.scratch.folder / ORIGINAL_FILE, files.samples), (folder / "model.onnx", given)
        )
        content = with_export(self.report | {"input": asdict(spec)}, check, latency)
        if files.config.int8:
            content = content | {"int8": self._export_int8(folder, spec, given)}
            content["files"] = [*content["files"][:1], INT8_FILE, *content["files"][1:]]
        write_report(content, folder)
        return content

    def _export_int8(self, folder: Path, spec: InputSpec, given: Inputs) -> dict[str, Any]:
        """Write model_int8.onnx; its bytes, errors, and latency beside model.onnx."""
        files, sources = self.files, self.files.sources
        source = folder / "model.onnx"
        if files.config.packs:  # what is rebuilt at session time is no constant to quantise
            source = files.scratch.folder / "dense.onnx"
            served = TakesPixels(self.model, spec) if spec.embedded else self.model
            export_onnx(served, source, given, input_name=spec.name)
        calibration = first_batches(sources.train, CALIBRATION_EXAMPLES)
        if spec.embedded:
            calibration = (to_pixels(inputs, spec) for inputs in calibration)
        path = folder / INT8_FILE
        size = quantize_int8(source, path, calibration)
        sets = {"validation": sources.validation, "test": sources.test}
        return {
            "bytes": size,
            "errors": {
                name: measure_file_error(path, batches, files.metric, spec)
                for name, batches in sets.items()
                if batches is not None
            },
            "latency": [
                {"batch": row.batch, "float_ms": row.original_ms, "int8_ms": row.slim_ms, "calls": row.calls}
                for row in measure_latency((folder / "model.onnx", given), (path, given))
            ],
        }


def _metadata(content: Mapping[str, Any], spec: InputSpec) -> dict[str, str]:
    """What a model.onnx says of itself, for who has nothing else."""
    data = content["data"] or {}
    told = {
        "made_by": f"vbdcompress {content['environment']['vbdcompress']}",
        "input": json.dumps(asdict(spec)),
        "data": data.get("name"),
        "classes": json.dumps(data["classes"]) if data.get("classes") else None,
        "error": f"{content['error']:.4g} % on the {content['error_split']} set",
    }
    return {name: value for name, value in told.items() if value}


def compress(
    model: nn.Module | ExportedProgram,
    loader: Iterable[Any],
    *,
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    loss: Loss = cross_entropy,
    metric: Metric = top1_error,
    input: InputSpec | None = None,
    unpack: Unpack | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    listener: Listener | None = None,
    verbose: bool = False,
    **options: Any,
) -> Result:
    """Make a trained network small: convert, fit, choose, slim, fine-tune, report.

    Args:
        model: any trained nn.Module, left as it was, or what torch.export made of one.
        loader: training batches (inputs, target), once an epoch; inputs are a tensor, a tuple of
            tensors (model(*inputs)) or a dict of them (model(**inputs)); (inputs,) where the network
            takes a tuple or dict as its one argument.
        validation: batches that the network was not trained on; None splits some off the loader.
        test: batches that are only read at the end.
        loss: (output, target) -> scalar mean NLL in nats.
        metric: (output, target) -> [batch] errors in [0, 1].
        input: normalisation of the inputs, to pass on in the report.
        unpack: batch -> (inputs, target), where a loader's batches are not such pairs.
        checkpoints: folder to keep training state in; with resume, a run that was cut off goes on.
        listener: told of steps and epochs.
        verbose: show progress and a line for each epoch in the terminal, where no listener is given.
        **options: fields of RunConfig: mode, threshold or a budget, epochs, skip, device, seed...
    Returns:
        the slim network with its report; `.export(folder)` writes the files.
    Raises:
        VbdcompressError: see the stages.

    Example:
        result = compress(model, loader, validation=held_out, mode="channels", max_error_increase=0.3)
        result.export("exports/mine")
    """
    for name in ("batch_size", "augment", "augment_pixels"):
        if name in options:
            raise ConfigError(
                "compress", f"option '{name}' is for named data sets.", "Your loader decides it."
            )
    config = make_config(options, "compress")
    if isinstance(model, ExportedProgram):
        model = from_exported(model)
    held_out = None if validation is None else True
    if validation is None:
        loader, validation = split_loader(loader, config.validation_fraction, config.seed)
    if unpack is not None:
        loader, validation = Unpacked(loader, unpack), Unpacked(validation, unpack)
        test = None if test is None else Unpacked(test, unpack)
    samples = first_inputs(loader)
    record = DataRecord(
        None,
        (),
        count_examples(loader),
        count_examples(validation),
        None if test is None else count_examples(test),
        held_out,
    )
    sources = Sources(loader, validation, test, record, input or InputSpec(example_shape(samples)))
    folder = None if checkpoints is None else Path(checkpoints)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    origin = Origin(type(model).__name__.lower(), type(model).__name__)
    with ExitStack() as stack:
        if verbose and listener is None:
            listener = stack.enter_context(FitProgress(Console()))
        place = Workplace(folder, resume, listener)
        result = run_stages(model, sources, config, origin, Judge(loss, metric), place)
    for message in result.report["warnings"]:
        warnings.warn(message, UserWarning, stacklevel=2)
    return result


def run_stages(
    model: nn.Module, sources: Sources, config: RunConfig, origin: Origin, judge: Judge, workplace: Workplace
) -> Result:
    """The whole way on prepared data; `compress` and the command line both end here."""
    fabric = start_fabric(config)
    # The order that a user's loader draws outside the fit is the run's own too, and ends with it
    with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        return _run_stages(fabric, model, sources, config, origin, judge, workplace)


def _run_stages(
    fabric: Any,
    model: nn.Module,
    sources: Sources,
    config: RunConfig,
    origin: Origin,
    judge: Judge,
    workplace: Workplace,
) -> Result:
    started = time.perf_counter()
    original = copy.deepcopy(model).cpu().eval()
    samples = to_device(first(first_inputs(sources.train), SAMPLES), torch.device("cpu"))
    check_model(original, first(samples, 2))
    if config.embed_preprocessing and not (sources.input.mean and isinstance(samples, torch.Tensor)):
        raise ConfigError(
            "embed_preprocessing",
            "nobody says by which mean and std the inputs are normalised.",
            "input=InputSpec(shape, mean, std)",
        )
    if config.int8 and len(_outputs(original, samples)) != 1:
        raise ConfigError("int8", "is for networks with one output.")
    if judge.loss is cross_entropy:
        check_labels(original, first(samples, 2), sources)
    if fabric.is_global_zero:
        workplace.claim(identify_run(original, sources.record, config, samples))
    fabric.barrier()
    scratch = Scratch()
    before = _original_size(original, scratch.folder / ORIGINAL_FILE, samples, sources.input.name)
    run = StageRunner(sources, original, config, judge, workplace, before, fabric.device)
    baseline = run.error(original, sources.validation)
    current, done = original, list[StageResult]()
    for number in range(len(config.rounds)):
        done.append(run.stage(current, samples, number, baseline))
        current = done[-1].model
    finetuned = run.finetune(current)
    rounding = run.round(current, done[-1].sigma, baseline)
    errors = run.final_errors(original, current, baseline)
    current = current.cpu().eval()
    context = ReportContext(
        name=origin.name,
        source=origin.source,
        architecture=origin.architecture,
        config=config.model_dump(mode="json"),
        input=sources.input,
        data=sources.record,
        errors=errors,
        stages=[stage.record for stage in done],
        finetune=finetuned,
        rounding=rounding,
        warnings=warnings_of(sources),
        seconds=time.perf_counter() - started,
        device=str(fabric.device),
    )
    after = measure_size(current, first(samples, 2), before.bytes - FLOAT_BYTES * before.parameters)
    content = report(original, current, first(samples, 2), (before, after), context)
    files = _Files(
        scratch, tuple(stage.plan for stage in done), samples, origin, sources, config, judge.metric, rounding
    )
    return Result(current, content, original, done[-1].sigma, files, fabric.is_global_zero)


def _outputs(model: nn.Module, samples: Inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return flatten_output(call(model, first(samples, 2)))


def _original_size(model: nn.Module, path: Path, samples: Inputs, input_name: str) -> Size:
    """Size of the network that came in; its bytes are those of its own ONNX file."""
    check = export_onnx(model, path, samples, input_name=input_name)
    return replace(measure_size(model, first(samples, 2)), bytes=check.bytes)
