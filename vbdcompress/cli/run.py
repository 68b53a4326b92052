"""vbdcompress run: the main job."""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from vbdcompress.cli.options import (
    config_options,
    data_options,
    given_options,
    guessed_normalisation,
    model_options,
    parse_arch_args,
    parse_normalisation,
    read_config,
    told_normalisation,
)
from vbdcompress.config import RunConfig, TrackerName
from vbdcompress.errors import ConfigError, DataError
from vbdcompress.files import is_text
from vbdcompress.records import InputSpec, held_out

if TYPE_CHECKING:
    from vbdcompress.data import DataSet
    from vbdcompress.loading import Loaded
    from vbdcompress.sources import Sources

STATE = ".state"
TRACKING = "tracking"


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: exports/NAME]")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file of the options from --prior on, with _ for -, and of a [first] round.",
)
@click.option("--validation", metavar="PATH", help="Folder or .npz of validation data of your own.")
@click.option(
    "--track",
    type=click.Choice(get_args(TrackerName)),
    help="Send curves to a tracker; tensorboard's files are in OUT/tracking.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from where an unfinished run stopped, with the same options; threshold, budget, bits and "
    "those of fine-tuning may be others.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace these files in the output folder; others in it stay."
)
@model_options
@data_options
@config_options()
def command(
    file: Path,
    out: Path | None,
    config_file: Path | None,
    validation: str | None,
    track: TrackerName | None,
    resume: bool,
    overwrite: bool,
    arch: str | None,
    arch_args: tuple[str, ...],
    unsafe_pickle: bool,
    data: str | None,
    data_root: Path | None,
    image_size: int | None,
    mean: str | None,
    std: str | None,
    **options: Any,
) -> None:
    """Compress the trained network in FILE and write model.onnx, slim.safetensors and reports.

    FILE is a checkpoint of `vbdcompress train`, a slim.safetensors to make smaller still, a state_dict (.pt
    or .safetensors) with --arch and --data, or with --unsafe-pickle a pickled network or a .pt2 program.

    \b
    Examples:
      vbdcompress run zoo/digits.pt
      vbdcompress run zoo/lenet_300_100.pt --data-root DATA --max-error-increase 0.3
      vbdcompress run mine.pt --arch mine.py:build --data photos/ --image-size 64 --mode channels
    """
    config = read_config("run", config_file, given_options(options))
    _run(
        file,
        out or Path("exports") / file.stem,
        config,
        _Reading(
            validation,
            arch,
            parse_arch_args(arch_args),
            unsafe_pickle,
            data,
            data_root,
            image_size,
            parse_normalisation(mean, std),
        ),
        _Ways(track, resume, overwrite),
    )


@dataclass(frozen=True)
class _Ways:
    """What a run does with an output folder that exists, and whom it tells."""

    track: TrackerName | None
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class _Reading:
    """How the network and its data are read."""

    validation: str | None
    arch: str | None
    arch_args: dict[str, Any]
    unsafe_pickle: bool
    data: str | None
    data_root: Path | None
    image_size: int | None
    normalisation: InputSpec | None

    def network(self, file: Path) -> "Loaded":
        """The network and what its file says."""
        from vbdcompress.loading import load

        return load(file, arch=self.arch, arguments=self.arch_args, unsafe_pickle=self.unsafe_pickle)

    def split(self, loaded: "Loaded", config: RunConfig) -> dict[str, Any]:
        """Fraction and seed of the validation split: the file's, so that it is what training left out.

        Where the file names none, the split that is made here is noted as one that training may have seen.
        """
        made = {"fraction": config.validation_fraction, "seed": config.seed, "held_out": False}
        return dict(loaded.validation or made)

    def dataset(self, loaded: "Loaded", config: RunConfig) -> "DataSet":
        """The data set that was asked for, or that the file names, normalised as the file says."""
        from vbdcompress.data import load_data

        name = self.data or loaded.data
        if name is None:
            raise DataError(
                "run", "the file does not name its data set.", "Name it: --data mnist, or a folder, or .npz"
            )
        split = self.split(loaded, config)
        return load_data(
            name,
            self.data_root,
            normalisation=told_normalisation(self.normalisation, loaded.input),
            validation_fraction=split["fraction"],
            validation_seed=split["seed"],
            validation_path=self.validation,
            image_size=self.image_size,
            classes=loaded.classes,
        )

    def sources(self, loaded: "Loaded", data: "DataSet", config: RunConfig) -> "Sources":
        """The data as the pipeline takes them, with what the report says of them."""
        from vbdcompress.reporting.build import DataRecord
        from vbdcompress.sources import Sources

        examples = len(data.train) + len(data.validation)
        left_out = held_out(loaded.validation, examples)
        split = self.split(loaded, config) | {"examples": examples}
        if not left_out:
            split["held_out"] = False
        record = DataRecord(
            data.recorded_name,
            data.classes,
            len(data.train),
            len(data.validation),
            None if data.test is None else len(data.test),
            True if self.validation or left_out else None,
            None if self.validation else split,
        )
        batch_size = config.examples_a_step(len(data.train))
        return Sources(
            data.train_batches(batch_size, config.seed, config.augment, config.augment_pixels),
            data.validation_batches(),
            data.test_batches(),
            record,
            data.input,
            self._notes(loaded, data),
        )

    def _notes(self, loaded: "Loaded", data: "DataSet") -> tuple[str, ...]:
        """What the user must know of how the data were read."""
        told = told_normalisation(self.normalisation, loaded.input)
        if told is not None and told.mean:
            return data.notes
        return (guessed_normalisation(data.input), *data.notes)


def _run(file: Path, out: Path, config: RunConfig, reading: _Reading, ways: _Ways) -> None:
    from rich.console import Console
    from rich.text import Text

    from vbdcompress.devices import first_on_machine_first, start_fabric
    from vbdcompress.evaluation import Judge
    from vbdcompress.pipeline import run_stages
    from vbdcompress.progress import FitProgress
    from vbdcompress.reporting.terminal import print_summary
    from vbdcompress.stages import Origin
    from vbdcompress.tracking import Listeners, open_tracker
    from vbdcompress.workplace import Workplace

    _check_folder(out, ways.resume, ways.overwrite)
    loaded = reading.network(file)
    with first_on_machine_first(config):
        data = reading.dataset(loaded, config)
    main = start_fabric(config).is_global_zero
    if main:
        if not ways.resume:  # tensorboard would draw the curves of an earlier run among this one's
            for left in (STATE, TRACKING) if ways.track == "tensorboard" else (STATE,):
                if (out / left).is_dir():
                    shutil.rmtree(out / left)
        (out / STATE).mkdir(parents=True, exist_ok=True)
    sources = reading.sources(loaded, data, config)
    origin = Origin(out.name, file.name, loaded.architecture, dict(loaded.arguments or {}), loaded.plans)
    console = Console(quiet=not main)
    workplace, tracker = Workplace(out / STATE, ways.resume), None
    try:
        _print_start(console, file, loaded, sources, config)
        if ways.track and main:
            tracker = open_tracker(ways.track, out.name, out / TRACKING, config.model_dump(mode="json"))
        with tracker or nullcontext():
            with FitProgress(console, every=max(1, config.epochs // 20)) as progress:
                listener = Listeners([progress, tracker]) if tracker else progress
                workplace = replace(workplace, listener=listener)
                result = run_stages(loaded.model, sources, config, origin, Judge(), workplace)
            if not result.is_main:
                return
            with console.status("Exporting and checking the ONNX file"):
                content = result.export(out)
    finally:
        if main:
            workplace.remove_if_empty()
    workplace.remove()
    if tracker:
        tracker.finish(content)
    print_summary(content, console)
    told = Text.assemble("Written to ", (str(out), "bold"), f": {', '.join(content['files'])}")
    console.print(told, soft_wrap=True)


def _print_start(console: Any, file: Path, loaded: "Loaded", sources: Any, config: RunConfig) -> None:
    from rich.text import Text

    from vbdcompress.sources import warnings_of

    record = sources.record
    told = f"{file.name}: {loaded.architecture or type(loaded.model).__name__} on {record.name}"
    counts = (
        f"{record.train:,} training, {record.validation:,} validation, {record.test or 0:,} test examples"
    )
    console.print(Text.assemble((told, "bold"), f"  ({counts}); mode {config.mode}"))
    for message in warnings_of(sources):
        console.print(Text.assemble(("Warning:", "yellow"), f" {message}"))


def _check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """An output folder that is new, asked to be replaced, or holds an unfinished run to go on from.

    Only looks: finished results stay until the new ones are there to replace them.

    Raises:
        ConfigError: it exists and nobody said what to do with it.
    """
    state = out / STATE
    if not is_text(str(out)):
        raise ConfigError("run", f"--out {str(out)!a} is no UTF-8.", "Name another folder.")
    if out.exists() and not out.is_dir():
        raise ConfigError("run", f"--out '{out}' is a file.", "Name a folder.")
    if resume and not state.is_dir():
        raise ConfigError(
            "run", f"there is no unfinished run in '{out}' to resume.", "Start one without --resume."
        )
    if out.is_dir() and any(out.iterdir()) and not resume and not overwrite:
        what = "an unfinished run" if state.is_dir() else "files"
        go_on = "--resume to go on, " if state.is_dir() else ""
        raise ConfigError(
            "run",
            f"folder '{out}' exists and holds {what}.",
            f"{go_on}--overwrite to replace it, or --out DIR",
        )
