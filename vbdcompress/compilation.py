"""torch.compile of the training step: all that the package asks of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vbdcompress.config import FitConfig
from vbdcompress.errors import FitError


def compile_(module: nn.Module, config: FitConfig) -> None:
    """Let torch.compile fuse a module's forward and backward pass, where the options ask for it, in place.

    Only how the module is called changes: not its parameters, their names, or the modules in it,
    so that what was fitted inside is the plain network. Compiled code draws other noise than the
    same code uncompiled, from the same seed; noise of the same distribution.
    """
    if config.compile:
        module.compile(mode="reduce-overhead" if config.cuda_graphs else "default")


@contextmanager
def compiled_code(config: FitConfig) -> Iterator[None]:
    """Around a fit: its compiled code goes when it ends, and a compiler that fails is named.

    torch keeps compiled code by function, eight kinds of each: fits of other networks in the same
    process would find the places taken and silently run uncompiled. Dropping all of the process's
    costs whoever needs theirs a compilation.

    Raises:
        FitError: torch.compile fails: no C++ compiler, no triton, or code that it can't take.
    """
    if not config.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise FitError(
            "compile",
            f"torch.compile fails: {' '.join(str(error).split()[:40])}",
            "It needs a C++ compiler on a CPU, triton on a GPU. Or leave --compile out.",
        ) from error
    finally:
        torch.compiler.reset()


def begin_step(config: FitConfig) -> None:
    """Before each step: what the last one left in memory that CUDA graphs own may be overwritten."""
    if config.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
