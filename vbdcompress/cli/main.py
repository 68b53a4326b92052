"""The group of commands, each read from its file only when it is called: `--help` must not wait for torch."""

import importlib
import os
import re
import sys
from io import TextIOWrapper
from typing import Any

import click

from vbdcompress.allocator import keep_freed_memory
from vbdcompress.errors import ConfigError, VbdcompressError

# name -> (module, what `vbdcompress --help` says of it)
COMMANDS = {
    "run": ("vbdcompress.cli.run", "Compress a trained network: .pt in, ONNX and report out."),
    "train": ("vbdcompress.cli.train", "Train a network from scratch to a .pt file that `run` takes."),
    "inspect": ("vbdcompress.cli.inspect", "Say what would be converted, and what can be removed."),
    "evaluate": ("vbdcompress.cli.evaluate", "Measure the error of a .pt, slim or ONNX file."),
    "bench": ("vbdcompress.cli.bench", "Measure how fast ONNX files are, side by side."),
    "report": ("vbdcompress.cli.report", "Render a finished folder's report again."),
    "zoo": ("vbdcompress.cli.zoo", "List architectures, data sets and the networks at hand."),
}
INTERRUPTED = 130
# What torch says of it, of the CPU and of a GPU
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, told) for name, (_, told) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="vbdcompress")
def _group() -> None:
    """Make a trained PyTorch network small by Variational Bayesian Dropout.

    With --debug anywhere on the line an error shows its traceback.

    \b
    Example:
      vbdcompress run zoo/digits.pt
      vbdcompress run zoo/lenet5.pt --data-root DATA --mode channels --max-error-increase 0.3
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command and end the process with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name that a console can't show must not end a run
    try:
        _group.main([item for item in given if item != "--debug"], standalone_mode=False)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        if debug:
            raise
        click.echo("\nInterrupted. `run` and `train` keep finished epochs: --resume goes on.", err=True)
        _leave(INTERRUPTED)
    except VbdcompressError as error:
        if debug:
            raise
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        _leave(2 if isinstance(error, ConfigError) else 1)
    except (MemoryError, RuntimeError) as error:
        if debug or not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))):
            raise
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(f"there is not enough memory: {str(error).splitlines()[0]}", err=True)
        _leave(1)
    except OSError as error:  # a full disk, a read-only folder
        if debug:
            raise
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), err=True)
        _leave(1)


def _leave(code: int) -> Any:
    """End this process; one of several must not wait for the others, who may wait for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
