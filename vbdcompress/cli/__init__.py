"""The command line: parse, call, print. Exit code 2 for wrong use, 1 for a failed run."""

from vbdcompress.cli.main import main

__all__ = ["main"]
