"""fit with torch.compile learns what it learns without, and leaves the plain network behind."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vbdcompress.architectures import build_architecture
from vbdcompress.checkpoints import FitCheckpoint
from vbdcompress.config import FitConfig, make_config
from vbdcompress.conversion import convert as convert_network
from vbdcompress.data import TensorBatches
from vbdcompress.errors import ConfigError, FitError
from vbdcompress.fitting import FitResult, fit
from vbdcompress.records import EpochRow

EAGER = FitConfig(device="cpu", epochs=3, lr=0.01, warmup_epochs=1)
COMPILED = EAGER.model_copy(update={"compile": True})

Make = Callable[[], nn.Module]
Convert = Callable[..., nn.Module]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile traces but generates no code, which takes long: what was asked of it is noted."""
    asked: list[Any] = []
    original = nn.Module.compile

    def record(module: nn.Module, *, mode: str) -> None:
        asked.append(mode)
        original(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", record)
    return asked


def rows(result: FitResult) -> list[float]:
    return [value for row in result.epochs for value in (row.nll, row.kl, row.error or 0.0)]


class StopAfter:
    """A listener that presses Ctrl-C once an epoch is over."""

    def on_start(self, title: str, epochs: int) -> None:
        """Takes no notice."""

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """Takes no notice."""

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        raise KeyboardInterrupt


def test_fit_compiled_equals_an_eager_fit(make_network: Make, small_batches: TensorBatches) -> None:
    results = []
    for config in (EAGER, COMPILED):
        # a second compilation of one step would cost more than it saves
        with torch._dynamo.config.patch(error_on_recompile=True):
            results.append(fit(make_network(), small_batches, config, validation=small_batches))
    assert rows(results[1]) == pytest.approx(rows(results[0]), rel=1e-5)
    assert type(results[1].model) is nn.Sequential
    for layer in results[1].model.modules():
        assert layer._compiled_call_impl is None
    plain, compiled = (result.model.state_dict() for result in results)
    assert list(plain) == list(compiled)
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-6)


def test_fit_compiled_draws_the_same_noise_again(
    backend: list[Any], make_network: Make, convert: Convert, small_batches: TensorBatches
) -> None:
    fits = [fit(convert(make_network()), small_batches, COMPILED) for _ in range(2)]
    assert rows(fits[0]) == rows(fits[1])
    assert fits[0].epochs[-1].kl > 0
    assert backend == ["default", "default"]
    eager = fit(convert(make_network()), small_batches, EAGER)  # the traced operations draw as eager ones do
    assert rows(fits[0]) == pytest.approx(rows(eager), rel=1e-5)


def test_fit_compiled_resumes(
    tmp_path: Path, backend: list[Any], make_network: Make, convert: Convert, small_batches: TensorBatches
) -> None:
    whole = fit(convert(make_network()), small_batches, COMPILED)
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", every_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        fit(convert(make_network()), small_batches, COMPILED, checkpoint=checkpoint, listener=StopAfter())
    went_on = replace(checkpoint, resume=True)
    resumed = fit(convert(make_network()), small_batches, COMPILED, checkpoint=went_on)
    assert rows(resumed) == rows(whole)
    # and a run may go on without it, or with it
    checkpoint.path.unlink()
    with pytest.raises(KeyboardInterrupt):
        fit(convert(make_network()), small_batches, EAGER, checkpoint=checkpoint, listener=StopAfter())
    resumed = fit(convert(make_network()), small_batches, COMPILED, checkpoint=went_on)
    assert rows(resumed) == pytest.approx(rows(whole), rel=1e-5)


def test_fit_compiles_a_teacher_that_is_asked_at_every_step(backend: list[Any]) -> None:
    images = torch.randn(8, 3, 32, 32)
    batches = TensorBatches(images, torch.arange(8), 4, shuffle=True, augment="crop-flip")
    model = build_architecture("vgg_cifar", {"width": 0.02})
    fit(model, batches, COMPILED.model_copy(update={"epochs": 1}), teacher=copy.deepcopy(model))
    assert backend == ["default", "default"]


def test_fit_asks_for_cuda_graphs(
    backend: list[Any], make_network: Make, small_batches: TensorBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    fit(make_network(), small_batches, COMPILED.model_copy(update={"cuda_graphs": True}))
    assert backend == ["reduce-overhead"]
    assert len(begun) == 9  # three epochs of three steps


def test_fit_says_where_torch_compile_fails(
    make_network: Make, small_batches: TensorBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = nn.Module.compile

    def refuse(*_: object) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(nn.Module, "compile", lambda module, mode: original(module, backend=refuse))
    with pytest.raises(FitError, match=r"compile: torch\.compile fails: .*no compiler here"):
        fit(make_network(), small_batches, COMPILED)


def test_cuda_graphs_need_compile() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs replays what compile made"):
        make_config({"cuda_graphs": True})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "weights", "channels"])
def test_fit_compiled_equals_an_eager_fit_of_a_resnet(mode: str) -> None:
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batches = TensorBatches(images, torch.arange(24) % 10, 8, shuffle=True, augment="crop-flip")
    results = []
    for config in (EAGER, COMPILED):
        torch.manual_seed(0)
        model = build_architecture("resnet20", {"channels": (4, 6, 8)})
        if mode != "plain":
            model = convert_network(model, images[:2], mode).model
        # torch's own generator in compiled code too: else its noise is another draw of the same distribution
        with torch._inductor.config.patch(fallback_random=True):
            # in double precision: training doubles what rounding leaves, step by step
            precise = config.model_copy(update={"precision": "64-true"})
            results.append(fit(model, batches, precise))
    assert rows(results[1]) == pytest.approx(rows(results[0]), rel=1e-5)
