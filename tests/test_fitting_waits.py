"""fit: nothing in an epoch waits for a number from the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vbdcompress.architectures import build_architecture
from vbdcompress.config import FitConfig
from vbdcompress.conversion import convert
from vbdcompress.data import TensorBatches
from vbdcompress.data.loaders import on_device
from vbdcompress.fitting import fit
from vbdcompress.records import EpochRow

STEPS = 3
# What .item(), float() and bool() of a tensor become; and operations whose result's shape is on the device
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "equal", "is_nonzero"}


class Recorder(TorchDispatchMode):
    """Writes down the waiting operations between an epoch's first step and its last."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.within, self.count = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if self.within:
            self.count += 1
            if name in WAITING or by_mask:
                self.found.append(name)
        return func(*args, **(kwargs or {}))

    def on_start(self, title: str, epochs: int) -> None:
        """Takes no notice."""

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        assert steps == STEPS
        self.within = step < STEPS

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        assert not self.within


def make_batches() -> TensorBatches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8 * STEPS, 3, 32, 32, generator=generator)
    return TensorBatches(images, torch.arange(8 * STEPS) % 10, 8, shuffle=True, augment="crop-flip")


def prepare(mode: str) -> tuple[nn.Module, nn.Module]:
    """A network to fit and its teacher."""
    plain = build_architecture("resnet20", {"channels": (4, 6, 8)})
    example = make_batches().inputs[:2]
    return (plain if mode == "plain" else convert(plain, example, mode).model), plain


@pytest.mark.parametrize("mode", ["plain", "weights", "channels"])
def test_fit_waits_for_no_number_within_an_epoch(mode: str) -> None:
    model, teacher = prepare(mode)
    config = FitConfig(device="cpu", epochs=1, clip_norm=1.0, precision="bf16-mixed")
    with Recorder() as recorder:
        fit(model, make_batches(), config, teacher=teacher, listener=recorder)
    assert recorder.count > 500  # it did look
    assert recorder.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("mode", ["plain", "weights", "channels"])
def test_fit_does_not_synchronise_with_a_gpu(mode: str) -> None:
    class Watch(Recorder):
        def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if 1 <= step < STEPS else "default")

    model, teacher = prepare(mode)
    config = FitConfig(device="cuda", epochs=2, clip_norm=1.0, precision="bf16-mixed")
    try:
        fitted = fit(model, make_batches(), config, teacher=teacher, listener=Watch())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(fitted.epochs) == 2


def test_on_device_moves_sets_in_memory_only(small_batches: TensorBatches) -> None:
    moved = on_device(small_batches, torch.device("meta"))
    assert moved.inputs.device.type == moved.labels.device.type == "meta"
    loader: list[Callable[..., Any]] = []
    assert on_device(loader, torch.device("meta")) is loader
