"""Devices and processes, by Lightning Fabric: what a fit runs on, and what its processes tell each other."""

import atexit
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from vbdcompress.config import FitConfig
from vbdcompress.errors import FitError

T = TypeVar("T")


def start_fabric(config: FitConfig) -> Fabric:
    """Start the processes that the configuration asks for and join them.

    On one machine `devices=N` starts the other N - 1 processes by running this program again.
    Under torchrun the processes are there already.

    Raises:
        FitError: the world is not the one asked for; silently training N separate networks, or
            one on a single process, is worse than stopping.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _under_torchrun() else None
    nodes = int(os.environ["WORLD_SIZE"]) // local if local else 1
    devices = config.devices or local or 1
    if local is not None and devices != local:
        raise FitError(
            "processes",
            f"--devices {devices} was asked for, torchrun started {local} on this machine.",
            "Leave --devices out under torchrun, or make them equal.",
        )
    fabric = _launch(config, devices, nodes)
    if fabric.world_size != devices * nodes:
        raise FitError(
            "processes",
            f"{devices * nodes} were asked for, {fabric.world_size} are running.",
            "Check torchrun's flags.",
        )
    if fabric.world_size > 1:
        atexit.unregister(_leave_processes)
        atexit.register(_leave_processes)
    return fabric


def _launch(config: FitConfig, devices: int, nodes: int) -> Fabric:
    with warnings.catch_warnings():
        # Fabric's advice to users of its own (unused GPUs, worker counts, matrix units) is not ours to give.
        warnings.filterwarnings("ignore", module="lightning_fabric")
        logger = logging.getLogger("lightning_fabric")
        logger.setLevel(max(logger.level, logging.WARNING))
        try:
            fabric = Fabric(
                accelerator=config.device,
                devices=devices,
                num_nodes=nodes,
                precision=config.precision,
                # a static graph may leave parameters without a gradient, as one process does
                strategy=DDPStrategy(static_graph=True) if devices * nodes > 1 else "auto",
            )
            fabric.launch()
        except (RuntimeError, ValueError, MisconfigurationException) as error:
            raise FitError(
                "device",
                f"'{config.device}' x {devices} can't be used: {error}",
                "Take what there is: --device auto",
            ) from error
    return fabric


@contextmanager
def named_loss_of_a_process(fabric: Fabric) -> Iterator[None]:
    """Around work of several processes: where one of them died, the others say so.

    What died has said why itself, if it could; here nothing but a broken connection is seen.

    Raises:
        FitError: the connection to another process broke, or a step takes other layers than the first.
    """
    try:
        with warnings.catch_warnings():
            # of weights of 1 x 1, whose order in memory is one and the same
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield
    except RuntimeError as error:
        if "training graph has changed" in str(error):  # torch's DDP
            raise FitError(
                "processes",
                "the network's code takes other layers in this step than in the first; several processes "
                "need the same in each.",
                "Train it in one: --devices 1",
            ) from error
        broken = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if fabric.world_size == 1 or not broken:
            raise
        raise FitError(
            "processes",
            f"process {fabric.global_rank} of {fabric.world_size} lost another one: it has ended or failed.",
            "Its own message says why; without one it was killed, perhaps for want of memory. From a "
            "checkpoint, where one is kept, --resume goes on, with any number of processes.",
        ) from error


@contextmanager
def first_on_machine_first(config: FitConfig) -> Iterator[None]:
    """Inside, the first process of each machine is alone until it is through; then come the others.

    Under torchrun all are there when data are read, and would download them at once. Those that
    `devices=N` starts begin after the first has read them.
    """
    if not _under_torchrun():
        yield
        return
    fabric = start_fabric(config)
    with named_loss_of_a_process(fabric), fabric.rank_zero_first(local=True):
        yield


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def wait_for_all(fabric: Fabric) -> None:
    """Until every process is here. Raises FitError where one ended instead."""
    with named_loss_of_a_process(fabric):
        fabric.barrier()


def of_main(fabric: Fabric, value: T) -> T:
    """The main process's value, in every process. Raises FitError where one ended instead."""
    with named_loss_of_a_process(fabric):
        return fabric.broadcast(value)


def share_buffers_(fabric: Fabric, model: nn.Module) -> None:
    """Give every process the main one's buffers, in place: each took statistics of norms in its last step."""
    if fabric.world_size > 1:
        buffers = list(model.buffers())
        for buffer, of_first in zip(buffers, of_main(fabric, [each.cpu() for each in buffers]), strict=True):
            buffer.copy_(of_first)


def check_same_start(fabric: Fabric, done: int) -> None:
    """Raise FitError where processes would begin at different epochs.

    Args:
        done: epochs that this process found in its checkpoint.
    """
    if fabric.world_size == 1:
        return
    total = fabric.all_reduce(torch.tensor(done, device=fabric.device), reduce_op="sum")
    if int(total) != done * fabric.world_size:  # type: ignore[arg-type]
        raise FitError(
            "resume",
            f"process {fabric.global_rank} found a checkpoint of {done} epochs, other processes of others.",
            "The output folder must lie on a disk that all machines share.",
        )


def _leave_processes() -> None:
    """At exit, not after a fit: the next fit joins the same processes.

    Without it a process may abort at exit on gloo ("terminate called without an active
    exception"), and torchrun then kills the others, whatever they are still writing.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
