"""Every write is to a temporary name beside the target and then renamed: a killed run leaves no half file."""

import os
import pickle
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vbdcompress.errors import LoadError


class Scratch:
    """A temporary folder that goes when this object does, at the end of the process at the latest."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vbdcompress-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` when the block ends well, removed when it does not."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to write to; its files move to `folder` together when the block ends well, else go."""
    for left in folder.glob(".[0-9]*.part"):  # of one that was killed
        shutil.rmtree(left, ignore_errors=True)
    new = folder / f".{os.getpid()}.part"
    new.mkdir(parents=True)
    try:
        yield new
        for path in sorted(new.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def is_text(name: str) -> bool:
    """Whether a file's name is text, not bytes of an unknown encoding: no report could hold these."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """torch.save of tensors and plain values, in one step."""
    with replacing(path) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:  # torch's own where the disk is full
            raise OSError(f"'{path}' can't be written, the disk may be full: {error}") from error


def load_tensors(path: Path) -> Any:
    """torch.load that runs no code from the file.

    Raises:
        LoadError: the file is damaged, or none of torch's.
        pickle.UnpicklingError: it names a class or function to call, and was not read further.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols before it refuses what they hold
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            warnings.filterwarnings("ignore", message="Validating sparse tensor invariants")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise
        # torch's own message recommends weights_only=False: not for a damaged file
        raise LoadError(f"file '{path}'", "can't be read: it is damaged, or no file of torch's.") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        what = str(error) or type(error).__name__
        raise LoadError(f"file '{path}'", f"can't be read, it may be cut short: {what}") from error
