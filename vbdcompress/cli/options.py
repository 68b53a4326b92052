"""Options that several commands share, and those made from the fields of the configuration."""

import ast
import math
import types
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click

from vbdcompress.config import FirstRound, RunConfig, make_config, read_toml
from vbdcompress.errors import ConfigError
from vbdcompress.records import InputSpec

Command = TypeVar("Command", bound=Callable[..., Any])


def config_options(names: Iterable[str] | None = None) -> Callable[[Command], Command]:
    """Options for fields of RunConfig (all, or those named): one source for name, type, default, help.

    The options of a first round are a table, for TOML files and keywords only.

    A command gets None (or an empty tuple) for what the user did not give; `given_options` drops these.
    """
    flat = [name for name, field in RunConfig.model_fields.items() if field.annotation is not FirstRound]
    chosen = flat if names is None else list(names)

    def decorate(command: Command) -> Command:
        for name in reversed(chosen):
            command = _option_of(name)(command)
        return command

    return decorate


def _option_of(name: str) -> Callable[[Command], Command]:
    field = RunConfig.model_fields[name]
    flag = "--" + name.replace("_", "-")
    told = field.description or ""
    if field.default not in (None, ()) and field.default is not False:  # 0 equals False
        told += f"  [default: {field.default}]"
    if field.annotation in (bool, bool | None):
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=told)
    if get_origin(field.annotation) is tuple:
        return click.option(flag, name, multiple=True, metavar="NAME", help=told)
    return click.option(flag, name, type=_click_type(field.annotation), default=None, help=told)


def _click_type(annotation: Any) -> Any:
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return str if str in kinds else _click_type(kinds[0])
    return annotation


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave."""
    return {key: value for key, value in values.items() if value not in (None, ())}


def read_config(
    command: str, file: Path | None, given: dict[str, Any], known: Iterable[str] | None = None
) -> RunConfig:
    """The options of a TOML file, those given on the command line before them.

    Args:
        command: that takes them, "run".
        known: options that it takes; None: all.
    Raises:
        ConfigError: names what is at fault, the file or the command line; both where each is right alone.
    """
    if file is None:
        return make_config(given, command)
    values, where = read_toml(file), f"config file '{file}'"
    foreign = [] if known is None else sorted(set(values) - set(known))
    if foreign:
        raise ConfigError(where, f"has options that `{command}` does not take: {', '.join(foreign)}.")
    try:
        return make_config(values | given, f"{command} with {where}")
    except ConfigError as error:
        both = error
    make_config(values, where)
    make_config(given, command)
    raise both


def model_options(command: Command) -> Command:
    """How a model file is read."""
    command = click.option(
        "--unsafe-pickle",
        is_flag=True,
        help="Also read a pickled network. It runs code from the file: only for files you trust as programs.",
    )(command)
    command = click.option(
        "--arch-arg",
        "arch_args",
        multiple=True,
        metavar="KEY=VALUE",
        help="Argument of the architecture's builder.",
    )(command)
    return click.option(
        "--arch",
        metavar="NAME",
        help="Architecture of a bare state_dict: lenet5, torchvision:resnet18, timm:NAME, "
        "package.module:function, file.py:function.",
    )(command)


def data_options(command: Command) -> Command:
    """Which data set, and where it lies."""
    command = click.option(
        "--std", metavar="X[,X,X]", help="Likewise: deviations that inputs are divided by."
    )(command)
    command = click.option(
        "--mean",
        metavar="X[,X,X]",
        help="Of each channel, of pixels in [0, 1]: what training subtracts; for nothing --mean 0 --std 1. "
        "Without it as the FILE says, where one is read, else measured on the training images.",
    )(command)
    command = click.option(
        "--image-size",
        type=click.IntRange(min=1),
        help="The shorter side of a folder's images is resized to this, then the middle cut out; for folders "
        "alone.",
    )(command)
    command = click.option(
        "--data-root",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="VBDCOMPRESS_DATA",
        help="Where torchvision's sets lie, or are downloaded to.  [env: VBDCOMPRESS_DATA]",
    )(command)
    return click.option(
        "--data",
        metavar="NAME|PATH",
        help="Data set: digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, svhn, stl10, a folder of "
        "class folders, or an .npz file; `run` and `evaluate` know it from a FILE that names its own.",
    )(command)


def parse_normalisation(mean: str | None, std: str | None) -> InputSpec | None:
    """--mean and --std as a normalisation for images of any shape; None where neither is given."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ConfigError("normalisation", "--mean and --std go together.", "For none: --mean 0 --std 1")
    try:
        means, stds = (tuple(float(part) for part in text.split(",")) for text in (mean, std))
    except ValueError as error:
        raise ConfigError("normalisation", f"'{mean}', '{std}' are not numbers like 0.5,0.5,0.5") from error
    finite = all(map(math.isfinite, (*means, *stds)))
    if len(means) != len(stds) or not finite or min(stds) <= 0:
        raise ConfigError(
            "normalisation",
            f"--mean {mean} and --std {std} must be as many finite numbers, the deviations above 0.",
        )
    return InputSpec((), means, stds)


def told_normalisation(given: InputSpec | None, of_file: InputSpec | None) -> InputSpec | None:
    """Mean and std as the command says them, else the file; the shape is the file's in both cases.

    Returns:
        None where neither says anything; without a mean where only the file speaks and says the shape alone,
        as that of a network that was compressed from Python without `input=` does.
    """
    if given is None or of_file is None:
        return given or of_file
    return replace(given, shape=of_file.shape)


def guessed_normalisation(taken: InputSpec) -> str:
    """What a user must know where neither the file nor the command says how inputs were normalised."""
    mean, std = ([round(value, 4) for value in values] for values in (taken.mean, taken.std))
    return (
        f"The file does not say how its inputs were normalised: mean {mean} and std {std}, measured on the "
        "training images, were taken. If training used others, every error here is wrong: "
        "give them by --mean and --std."
    )


def parse_arch_args(pairs: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value that reads as a Python literal is one, else a string."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError("--arch-arg", f"'{pair}' is not KEY=VALUE.")
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[key] = text
    return arguments
