"""vbdcompress evaluate: the error of a file on a data set."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vbdcompress.cli.options import (
    data_options,
    guessed_normalisation,
    model_options,
    parse_arch_args,
    parse_normalisation,
    told_normalisation,
)
from vbdcompress.errors import TRACE_ERRORS, ConfigError, DataError, LoadError
from vbdcompress.records import held_out

if TYPE_CHECKING:
    from torch import Tensor

    from vbdcompress.data import TensorBatches
    from vbdcompress.records import InputSpec

_SEEN = (
    "The file does not say which of these examples training left out: it may have seen some of this split. "
    "Pass validation data of your own: --validation PATH"
)


@click.command("evaluate")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option(
    "--validation",
    metavar="PATH",
    help="Folder or .npz of data of your own to measure on: the validation split then.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Examples in one call; without it 1000, fewer where images are large.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@model_options
@data_options
def command(
    file: Path,
    split: str,
    validation: str | None,
    batch_size: int | None,
    as_json: bool,
    arch: str | None,
    arch_args: tuple[str, ...],
    unsafe_pickle: bool,
    data: str | None,
    data_root: Path | None,
    image_size: int | None,
    mean: str | None,
    std: str | None,
) -> None:
    """Print the error in percent of the network in FILE: a .pt, a slim.safetensors, or an .onnx.

    FILE may be a folder that `run` wrote: then its model.onnx. An ONNX file is run by onnxruntime,
    its inputs normalised as it says, or else the report.json beside it.

    \b
    Example:
      vbdcompress evaluate exports/digits
      vbdcompress evaluate exports/lenet5/model.onnx --data-root DATA
    """
    from vbdcompress.data import load_data

    if file.is_dir():
        file = file / "model.onnx"
    split = "validation" if validation else split
    network = _open_network(file, arch, parse_arch_args(arch_args), unsafe_pickle)
    name = data or network.data
    if name is None:
        raise DataError("evaluate", "the file does not name its data set.", "--data NAME")
    held = network.validation or {}
    if network.input and network.input.embedded and mean is not None:
        raise ConfigError("evaluate", f"{file.name} normalises by itself.", "Leave --mean and --std out.")
    normalisation = told_normalisation(parse_normalisation(mean, std), network.input)
    dataset = load_data(
        name,
        data_root,
        normalisation=normalisation,
        validation_fraction=float(held.get("fraction", 0.1)),
        validation_seed=int(held.get("seed", 0)),
        validation_path=validation,
        image_size=image_size,
        classes=network.classes,
    )
    for note in dataset.notes:
        click.echo(f"Warning: {note}", err=True)
    if normalisation is None or not normalisation.mean:
        click.echo(f"Warning: {guessed_normalisation(dataset.input)}", err=True)
    examples = len(dataset.train) + len(dataset.validation)
    if split == "validation" and not (validation or held_out(network.validation, examples)):
        click.echo(f"Warning: {_SEEN}", err=True)
    batches = dataset.test_batches(batch_size) if split == "test" else dataset.validation_batches(batch_size)
    if batches is None:
        raise DataError(f"data set '{name}'", "has no test part.", "--split validation")
    error = network.error(batches)
    name = validation or name  # what was measured on
    told = f"{file.name} on {name}: {error:.2f} % {split} error ({batches.num_examples:,} examples)"
    found = {"file": file.name, "data": name, "split": split, "error": error}
    click.echo(json.dumps(found) if as_json else told)


class _Network:
    """A network of any kind of file, and how to measure it."""

    def __init__(
        self, data: str | None, input: "InputSpec | None", validation: Any, run: Any, classes: Any
    ) -> None:
        self.data, self.input, self.validation, self.run = data, input, validation, run
        self.classes = tuple(classes)

    def error(self, batches: "TensorBatches") -> float:
        """Top-1 error in percent."""
        from vbdcompress.evaluation import mean_error

        largest = int(batches.labels.max())

        def run(inputs: "Tensor") -> Any:
            try:
                output = self.run(inputs)
            except TRACE_ERRORS as error:
                told = f"the network fails on inputs of shape {tuple(inputs.shape)}"
                raise DataError("evaluate", f"{told}: {type(error).__name__}: {error}") from error
            _check_logits(output, len(inputs), largest)
            return output

        return mean_error(run, batches)


def _check_logits(output: Any, examples: int, largest: int) -> None:
    """Raise DataError where a network gives no logits [batch, classes], or none for the largest label."""
    from torch import Tensor

    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == examples:
        if (classes := output.shape[1]) > largest:
            return
        raise DataError(
            "evaluate",
            f"the data have labels up to {largest}, the network has {classes} outputs.",
            "Labels count from 0; the data must be of the classes that it was trained on.",
        )
    found = f"a {type(output).__name__}"
    if isinstance(output, list | tuple):
        found += f" of {len(output)}"
    if isinstance(output, Tensor):
        found = f"a tensor of shape {list(output.shape)} for {examples} examples"
    raise DataError(
        "evaluate",
        f"the network gives {found}, allowed are logits [batch, classes].",
        "Wrap the network so that its one output is that.",
    )


def _open_network(file: Path, arch: str | None, arguments: dict[str, Any], unsafe_pickle: bool) -> _Network:
    if not file.is_file():
        raise ConfigError("evaluate", f"file '{file}' does not exist.")
    if file.suffix == ".onnx":
        return _open_onnx(file)
    import torch

    from vbdcompress.loading import load

    loaded = load(file, arch=arch, arguments=arguments, unsafe_pickle=unsafe_pickle)
    run = torch.no_grad()(loaded.model)
    return _Network(loaded.data, loaded.input, loaded.validation, run, loaded.classes)


def _open_onnx(file: Path) -> _Network:
    import numpy as np
    import torch

    from vbdcompress.exporting.onnx_file import open_session, run_session
    from vbdcompress.exporting.preprocessing import inputs_for
    from vbdcompress.inputs import resize
    from vbdcompress.records import InputSpec

    session = open_session(file)
    if len(names := [item.name for item in session.get_inputs()]) != 1:
        raise DataError("evaluate", f"file '{file}' takes {len(names)} inputs: {', '.join(names)}.")
    own = session.get_modelmeta().custom_metadata_map
    own = own if own.get("made_by", "").startswith("vbdcompress") else {}
    # The file's own word counts: it may stand beside another file's report
    content = _read_beside(file, needed="input" not in own)
    data = content.get("data") or {}
    try:
        found = {key: json.loads(own[key]) for key in ("input", "validation", "classes") if key in own}
        told = {"input": content.get("input"), "validation": data.get("split")} | found
        spec = None if told["input"] is None else InputSpec.from_json(told["input"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("evaluate", f"file '{file}' has malformed properties: {error!r}.") from error
    name, split = own.get("data", data.get("name")), told["validation"]

    size = (session.get_inputs()[0].shape or [None])[0]

    def run(inputs: torch.Tensor) -> Any:
        given = inputs if spec is None else inputs_for(spec, inputs)
        if isinstance(size, int):  # a file of one batch: examples beside the last ones are not counted
            pieces = [run_session(session, resize(piece, size)) for piece in given.split(size)]
            outputs = [np.concatenate(parts)[: len(given)] for parts in zip(*pieces, strict=True)]
        else:
            outputs = run_session(session, given)
        output = outputs[0] if len(outputs) == 1 else outputs
        return torch.from_numpy(output) if isinstance(output, np.ndarray) else output

    return _Network(name, spec, split, run, told.get("classes") or data.get("classes") or ())


def _read_beside(file: Path, needed: bool) -> dict[str, Any]:
    """The report.json beside a file; {} where there is none, or one that can't be read and isn't needed."""
    from vbdcompress.reporting.write import read_report

    if not (file.parent / "report.json").is_file():
        return {}
    try:
        return read_report(file.parent)
    except LoadError:  # another program's
        if needed:
            raise
        return {}
