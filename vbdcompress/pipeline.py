"""compress: the whole way, a line a stage."""

import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.export import ExportedProgram

from vbdcompress.budget import warn_of_undecided
from vbdcompress.cautions import warn_of_frozen, warn_of_numbers, warn_of_one_class, warn_of_shapes
from vbdcompress.choosing import FileSize
from vbdcompress.config import RunConfig, make_config
from vbdcompress.conversion import computed_weights
from vbdcompress.count import measure_size
from vbdcompress.data import TensorBatches, Unpack, Unpacked, count_examples, share_examples, split_loader
from vbdcompress.data.loaders import drawn_from, kept_generators, seed_generators, unpack_of, whole
from vbdcompress.devices import start_fabric, wait_for_all
from vbdcompress.errors import ConfigError, ExportError
from vbdcompress.evaluation import Judge, Loss, Metric, cross_entropy, to_device, top1_error, with_gradients
from vbdcompress.exported import from_exported
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.files import Scratch
from vbdcompress.inputs import Inputs, are_alike, example_shape, first
from vbdcompress.modes import evaluated
from vbdcompress.originals import check_model, copy_of, unwrap
from vbdcompress.parametrized import store_weights_
from vbdcompress.preflight import check_run
from vbdcompress.progress import FitProgress
from vbdcompress.records import InputSpec, Size
from vbdcompress.reporting.build import DataRecord, ReportContext, report
from vbdcompress.result import ORIGINAL_FILE, Result, ResultFiles
from vbdcompress.sources import TESTED, Sources, check_parts, first_batch, other_shapes, warnings_of
from vbdcompress.stages import Origin, StageRunner
from vbdcompress.training import Listener
from vbdcompress.workplace import Workplace, identify_run

SAMPLES = 64


@with_gradients()
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
            takes a tuple or dict as its one argument. Or dicts of inputs with their "labels" among them.
        validation: batches that the network was not trained on; None splits some off the loader.
        test: batches whose error is measured once, at the end.
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
    model = unwrap(model)
    with ExitStack() as stack:
        stack.enter_context(kept_generators(loader, validation, test))
        seen = validation is None or share_examples(loader, validation)
        notes = (TESTED,) if any(share_examples(part, test) for part in (loader, validation)) else ()
        if validation is None:
            loader, validation = split_loader(loader, config.validation_fraction, config.seed)
        unpack = unpack_of(loader) if unpack is None else unpack
        if unpack is not None:
            loader, validation = Unpacked(loader, unpack), Unpacked(validation, unpack)
            test = None if test is None else Unpacked(test, unpack)
        validation, test = whole(validation), None if test is None else whole(test)
        check_parts(loader, validation, test)
        record = DataRecord(
            None,
            (),
            count_examples(loader),
            count_examples(validation),
            None if test is None else count_examples(test),
            None if seen else True,
        )
        sources = Sources(loader, validation, test, record, input or InputSpec(()), notes)
        folder = None if checkpoints is None else Path(checkpoints)
        if folder is None and resume:
            raise ConfigError("compress", "resume=True names no folder to go on from.", "checkpoints=FOLDER")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        origin = Origin(type(model).__name__.lower(), type(model).__name__)
        if verbose and listener is None:
            listener = stack.enter_context(FitProgress(Console()))
        place = Workplace(folder, resume, listener)
        result = run_stages(model, sources, config, origin, Judge(loss, metric), place)
    for message in result.report["warnings"] if result.is_main else ():
        warnings.warn(message, UserWarning, stacklevel=3)  # past the decorator
    return result


def run_stages(
    model: nn.Module, sources: Sources, config: RunConfig, origin: Origin, judge: Judge, workplace: Workplace
) -> Result:
    """The whole way on prepared data; `compress` and the command line both end here."""
    fabric = start_fabric(config)
    sources = replace(sources, input=replace(sources.input, embedded=config.embed_preprocessing))
    # The order that a user's loader draws outside the fit is the run's own too, and ends with it
    with drawn_from(config.seed):
        seed_generators(sources.train, config.seed)
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
    original = evaluated(copy_of(model).cpu())
    inputs, target = first_batch(sources.train)
    samples = to_device(first(inputs, SAMPLES), torch.device("cpu"))
    if not sources.input.shape:
        sources = replace(sources, input=replace(sources.input, shape=example_shape(samples)))
    check_model(original, first(samples, 2), of=model)
    found = other_shapes(sources, samples, config.seed)
    check_run(original, samples, target, sources, config, judge, found)
    if fabric.is_global_zero:
        _claim(workplace, original, samples, sources, config, judge)
    wait_for_all(fabric)
    scratch = Scratch()
    path, name = scratch.folder / ORIGINAL_FILE, sources.input.name
    before, others = _original_size(original, path, samples, found, name, config.skip)
    sizes = FileSize(config, original, before.bytes, samples, sources, others)
    run = StageRunner(sources, original, config, judge, workplace, before, sizes, fabric.device)
    baseline = run.baseline(original)
    done = run.rounds(original, samples, baseline)
    current = done[-1].model
    finetuned = run.finetune(current)
    rounding = run.round(current, done[-1].sigma, baseline)
    errors = run.final_errors(original, current, baseline)
    original, current = original.cpu(), evaluated(current.cpu())
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
        warnings=[
            *warnings_of(sources),
            *warn_of_shapes(samples, found, others),
            *warn_of_numbers(sources, samples, config.seed),
            *warn_of_frozen(original, current),
            *(warn_of_one_class(original, current, samples) if judge.metric is top1_error else ()),
            *run.told,
            *run.excess(current, rounding, errors),
            *(told for n, stage in enumerate(done) for told in warn_of_undecided(stage.record, config, n)),
        ],
        seconds=time.perf_counter() - started + run.earlier,
        device=str(fabric.device),
    )
    content = report(original, current, first(samples, 2), (before, sizes.measure(current)), context)
    plans = (*origin.plans, *(stage.plan for stage in done))
    files = ResultFiles(scratch, plans, samples, others, origin, sources, config, judge.metric, rounding)
    return Result(current, content, original, done[-1].sigma, files, fabric.is_global_zero)


def _claim(
    workplace: Workplace, model: nn.Module, samples: Inputs, sources: Sources, config: RunConfig, judge: Judge
) -> None:
    """Note what run the checkpoints are of. Raises FitError: see `Workplace.claim`."""
    record, spec = sources.record, sources.input
    data = (record.name, record.train, record.validation, list(spec.mean), list(spec.std))
    loss = None if judge.loss is cross_entropy else judge.loss
    metric = None if judge.metric is top1_error else judge.metric
    held = [each for each in (sources.train, sources.validation) if isinstance(each, TensorBatches)]
    digests = [each.digest() for each in held]
    workplace.claim(identify_run(model, data, config, samples, loss, metric, digests))


def _original_size(
    model: nn.Module,
    path: Path,
    samples: Inputs,
    others: Sequence[Inputs],
    input_name: str,
    skip: Sequence[str],
) -> tuple[Size, Sequence[Inputs]]:
    """Size of the network that came in, as its own ONNX file holds it, and what else that file takes."""
    if not are_alike([samples, *others]):
        others = ()
    try:
        check = export_onnx(model, path, samples, input_name=input_name, others=others)
    except ExportError:
        if not others:
            raise
        others = ()  # its code may take one shape alone once it is traced
        check = export_onnx(model, path, samples, input_name=input_name)
    stored, example = copy_of(model), first(samples, 2)
    store_weights_(stored, computed_weights(stored, example, skip))  # as the slim network's, which are kept
    return replace(measure_size(stored, example), bytes=check.bytes), others
