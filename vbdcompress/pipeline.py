"""compress: the whole way, a line a stage."""

import copy
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vbdcompress.config import RunConfig, make_config
from vbdcompress.conversion import convert
from vbdcompress.count import FLOAT_BYTES, measure_size
from vbdcompress.data import count_examples, split_loader
from vbdcompress.devices import start_fabric
from vbdcompress.errors import DataError
from vbdcompress.evaluation import Loss, Metric, cross_entropy, measure_error, top1_error
from vbdcompress.exporting.export import export
from vbdcompress.exporting.latency import measure_latency
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.slim_file import SlimFile
from vbdcompress.files import Scratch
from vbdcompress.fitting import FitCheckpoint, Listener, default_beta, fit
from vbdcompress.records import CurvePoint, EpochRow, InputSpec, Selection, Size
from vbdcompress.reporting.build import (
    DataRecord,
    ErrorRecord,
    ReportContext,
    StageRecord,
    log_alpha_histogram,
    report,
    with_export,
)
from vbdcompress.reporting.write import write_report
from vbdcompress.slimming import (
    CURVE_THRESHOLDS,
    DEFAULT_THRESHOLD,
    Budget,
    make_budget,
    measure_curve,
    reestimate_batch_norm_,
    select_threshold,
    slim,
)
from vbdcompress.surgery.slice import RemovalPlan

SAMPLES = 64
ORIGINAL_FILE = "original.onnx"


@dataclass(frozen=True)
class Sources:
    """The data of a run, and what is known of it.

    Attributes:
        train, validation, test: yield (input, target) batches; test may be None.
        record: names and counts for the report.
        input: shape and normalisation.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any] | None
    record: DataRecord
    input: InputSpec


@dataclass(frozen=True)
class Origin:
    """Where the network came from, for the files: architecture and arguments where it has a name."""

    name: str
    source: str | None = None
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """How outputs are judged: loss while training, metric when measured."""

    loss: Loss = cross_entropy
    metric: Metric = top1_error


@dataclass(frozen=True)
class Workplace:
    """Where a run keeps its checkpoints, whether it goes on from them, and who is told of it."""

    folder: Path | None = None
    resume: bool = False
    listener: Listener | None = None

    def checkpoint(self, step: str) -> FitCheckpoint | None:
        """The checkpoint of one step of the run; None where nothing is kept."""
        return None if self.folder is None else FitCheckpoint(self.folder / f"{step}.ckpt", self.resume)


@dataclass(frozen=True)
class Result:
    """What `compress` gives.

    Attributes:
        model: slim, an ordinary nn.Module in eval mode.
        report: the content of report.json; export and latency are null until `export`.
        original: the network that came in, for comparison.
        scratch: folder with its ONNX file, for comparison too; gone when this object is.
        plans: removal plans, one a stage.
        samples: the first inputs of the training loader, what the files are checked on.
        header: what slim.safetensors says beside its tensors.
        is_main: False in all but one of several processes: only the main one should write.
    """

    model: nn.Module
    report: dict[str, Any]
    original: nn.Module
    scratch: Scratch
    plans: tuple[RemovalPlan, ...]
    samples: Tensor
    header: SlimFile
    is_main: bool

    def export(self, folder: str | Path) -> dict[str, Any]:
        """Write model.onnx, slim.safetensors, report.json and report.html; returns the full report.

        Raises:
            ExportError: the ONNX file does not equal the network; it is not kept.
        """
        folder = Path(folder)
        check = export(self.model, folder, self.samples, self.header)
        latency = measure_latency(self.scratch.folder / ORIGINAL_FILE, folder / "model.onnx", self.samples)
        content = with_export(self.report, check, latency)
        write_report(content, folder)
        return content


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    loss: Loss = cross_entropy,
    metric: Metric = top1_error,
    input: InputSpec | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    listener: Listener | None = None,
    **options: Any,
) -> Result:
    """Make a trained network small: convert, fit, choose, slim, fine-tune, report.

    Args:
        model: any trained nn.Module; left as it was.
        loader: training batches (input, target), once an epoch.
        validation: batches that the network was not trained on; None splits some off the loader.
        test: batches that are only read at the end.
        loss: (output, target) -> scalar mean NLL in nats.
        metric: (output, target) -> [batch] errors in [0, 1].
        input: normalisation of the inputs, to pass on in the report.
        checkpoints: folder to keep training state in; with resume, a run that was cut off goes on.
        listener: told of steps and epochs.
        **options: fields of RunConfig: mode, threshold or a budget, epochs, skip, device, seed...
    Returns:
        the slim network with its report; `.export(folder)` writes the files.
    Raises:
        VbdcompressError: see the stages.

    Example:
        result = compress(model, loader, validation=held_out, mode="channels", max_error_increase=0.3)
        result.export("exports/mine")
    """
    config = make_config(options, "compress")
    held_out = None if validation is None else True
    if validation is None:
        loader, validation = split_loader(loader, config.validation_fraction, config.seed)
    samples = _first_inputs(loader)
    record = DataRecord(
        None,
        (),
        count_examples(loader),
        count_examples(validation),
        None if test is None else count_examples(test),
        held_out,
    )
    sources = Sources(loader, validation, test, record, input or InputSpec(tuple(samples.shape[1:])))
    folder = None if checkpoints is None else Path(checkpoints)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    origin = Origin(type(model).__name__.lower(), type(model).__name__)
    result = run_stages(
        model, sources, config, origin, Judge(loss, metric), Workplace(folder, resume, listener)
    )
    for message in result.report["warnings"]:
        warnings.warn(message, UserWarning, stacklevel=2)
    return result


def run_stages(
    model: nn.Module, sources: Sources, config: RunConfig, origin: Origin, judge: Judge, workplace: Workplace
) -> Result:
    """The whole way on prepared data; `compress` and the command line both end here."""
    started = time.perf_counter()
    fabric = start_fabric(config)
    original = copy.deepcopy(model).cpu().eval()
    samples = _first_inputs(sources.train)[:SAMPLES].cpu()
    scratch = Scratch()
    before = _original_size(original, scratch.folder / ORIGINAL_FILE, samples, sources.input.name)
    run = _Run(sources, config, judge, workplace, before, fabric.device)
    baseline = run.error(original, sources.validation)
    current, plans, stages = original, [], []
    for number, mode in enumerate(_stage_modes(config)):
        current, plan, stage = run.stage(current, samples, mode, number, baseline)
        plans.append(plan)
        stages.append(stage)
    finetuned = run.finetune(current)
    errors = run.final_errors(original, current, baseline)
    current = current.cpu().eval()
    header = SlimFile(tuple(plans), origin.architecture, origin.arguments, sources.record.name, sources.input)
    context = ReportContext(
        name=origin.name,
        source=origin.source,
        architecture=origin.architecture,
        config=config.model_dump(mode="json"),
        input=sources.input,
        data=sources.record,
        errors=errors,
        stages=stages,
        finetune=finetuned,
        warnings=_warnings(sources.record),
        seconds=time.perf_counter() - started,
        device=str(fabric.device),
    )
    after = measure_size(current, samples[:2], before.bytes - FLOAT_BYTES * before.parameters)
    content = report(original, current, samples[:2], (before, after), context)
    return Result(current, content, original, scratch, tuple(plans), samples, header, fabric.is_global_zero)


class _Run:
    """What is the same for all stages of one run."""

    def __init__(
        self,
        sources: Sources,
        config: RunConfig,
        judge: Judge,
        workplace: Workplace,
        original: Size,
        device: torch.device,
    ) -> None:
        self.sources, self.config, self.judge = sources, config, judge
        self.workplace, self.original, self.device = workplace, original, device

    def error(self, model: nn.Module, batches: Iterable[Any]) -> float:
        """Error in percent, measured on the run's device."""
        return measure_error(model.to(self.device), batches, self.judge.metric)

    def prepare(self, model: nn.Module) -> None:
        """Take batch norm's statistics anew on training data, without noise, in place."""
        reestimate_batch_norm_(model.to(self.device), self.sources.train)

    def stage(
        self,
        model: nn.Module,
        samples: Tensor,
        mode: Literal["weights", "channels"],
        number: int,
        baseline: float,
    ) -> tuple[nn.Module, RemovalPlan, StageRecord]:
        """Convert, fit, choose and slim once; the slim network, its plan, and the record."""
        config, sources = self.config, self.sources
        converted = convert(
            model,
            samples[:2],
            mode,
            skip=config.skip,
            prune_inputs=config.prune_inputs,
            log_sigma2=config.log_sigma2,
        )
        fitted = fit(
            converted.model,
            sources.train,
            config,
            validation=sources.validation,
            loss=self.judge.loss,
            metric=self.judge.metric,
            threshold=_log_threshold(config, mode),
            num_data=sources.record.train,
            checkpoint=self.workplace.checkpoint(f"{number + 1}-{mode}"),
            listener=self.workplace.listener,
        )
        curve = measure_curve(
            converted,
            lambda candidate: self.error(candidate, sources.validation),
            prepare=self.prepare,
            graph_bytes=self.original.bytes - FLOAT_BYTES * self.original.parameters,
            thresholds=(*CURVE_THRESHOLDS, _log_threshold(config, mode)),
        )
        selection = self._select(curve, mode, number, baseline)
        slimmed = slim(converted, selection.threshold)
        self.prepare(slimmed.model)
        record = StageRecord(
            mode,
            config.prior,
            default_beta(converted.model) if config.beta is None else config.beta,
            converted.table,
            slimmed.groups,
            fitted.epochs,
            curve,
            selection,
            log_alpha_histogram(converted.model),
        )
        return slimmed.model, slimmed.plan, record

    def _select(self, curve: Sequence[CurvePoint], mode: str, number: int, baseline: float) -> Selection:
        budget = make_budget(self.config, self.original)
        if self.config.mode == "both" and number == 0 and self.config.has_budget:
            # Channels first: half of the error budget is left to the weights, whose stage also
            # answers for parameters and bytes.
            half = None if budget.max_error_increase is None else budget.max_error_increase / 2
            macs = {key: bound for key, bound in budget.limits.items() if key == "macs"}
            budget = Budget(None, half, macs)
        return select_threshold(curve, budget, mode, baseline)

    def finetune(self, model: nn.Module) -> tuple[EpochRow, ...]:
        """Ordinary training of the slim network, in place; weights that are 0 stay 0."""
        if not self.config.finetune_epochs:
            return ()
        config = self.config.model_copy(
            update={
                "epochs": self.config.finetune_epochs,
                "lr": self.config.lr_finetune,
                "schedule": "linear",
            }
        )
        fitted = fit(
            model,
            self.sources.train,
            config,
            validation=self.sources.validation,
            loss=self.judge.loss,
            metric=self.judge.metric,
            num_data=self.sources.record.train,
            keep_zeros=True,
            checkpoint=self.workplace.checkpoint("finetune"),
            listener=self.workplace.listener,
        )
        return fitted.epochs

    def final_errors(self, original: nn.Module, slimmed: nn.Module, baseline: float) -> ErrorRecord:
        """Validation and, for the first and only time, test error of both networks."""
        after = self.error(slimmed, self.sources.validation)
        if self.sources.test is None:
            return ErrorRecord(baseline, after)
        tested = [self.error(model, self.sources.test) for model in (original, slimmed)]
        return ErrorRecord(baseline, after, tested[0], tested[1])


def _stage_modes(config: RunConfig) -> tuple[Literal["weights", "channels"], ...]:
    return ("channels", "weights") if config.mode == "both" else (config.mode,)


def _log_threshold(config: RunConfig, mode: str) -> float:
    """Threshold for the epoch log's error and sparsity, while a budget has not chosen yet."""
    return DEFAULT_THRESHOLD[mode] if config.threshold is None else config.threshold


def _first_inputs(loader: Iterable[Any]) -> Tensor:
    """The inputs of the first batch. Raises DataError where there is none, or it is not (tensor, labels)."""
    batch = next(iter(loader), None)
    if batch is None:
        raise DataError("loader", "is empty: it yields no batch.")
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise DataError(
            "loader",
            f"yields {type(batch).__name__}s, allowed are pairs of an input tensor and targets.",
            "Wrap it in a generator that yields (input, target).",
        )
    inputs: Tensor = batch[0]
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        raise DataError("loader", "the first batch holds NaN or infinite values.")
    return inputs


def _original_size(model: nn.Module, path: Path, samples: Tensor, input_name: str) -> Size:
    """Size of the network that came in; its bytes are those of its own ONNX file."""
    check = export_onnx(model, path, samples, input_name=input_name)
    return replace(measure_size(model, samples[:2]), bytes=check.bytes)


def _warnings(record: DataRecord) -> list[str]:
    messages = []
    if record.validation_held_out is not True:
        known = "was" if record.validation_held_out is False else "may have been"
        messages.append(
            f"The network {known} trained on its validation examples: it looks better on them than it is, "
            "and a budget measured there misleads. Pass validation data of your own."
        )
    if record.test is None:
        messages.append(
            "There is no test set: the error is the validation error, on which choices were made."
        )
    return messages
