"""fit: what it learns, what it reports, and where it stops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.architectures import build_architecture
from vbdcompress.config import FitConfig, RunConfig
from vbdcompress.data import DataSet, TensorBatches
from vbdcompress.evaluation import measure_error
from vbdcompress.fitting import fit
from vbdcompress.records import EpochRow
from vbdcompress.vbd.gates import ChannelGate, InputGate, attach_gate_
from vbdcompress.vbd.posterior import find_posteriors

Make = Callable[[], nn.Module]
Convert = Callable[..., nn.Module]
STILL = {"lr": 1e-12, "lr_log_sigma2": 1e-12, "warmup_epochs": 0, "device": "cpu"}


def settings(**options: Any) -> FitConfig:
    return FitConfig(**({"device": "cpu", "epochs": 2} | options))


class Recorder:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int | None, int]] = []
        self.rows: list[tuple[EpochRow, int]] = []

    def on_start(self, title: str, epochs: int) -> None:
        """Takes no notice."""

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        self.steps.append((epoch, step, steps, examples))

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        self.rows.append((row, epochs))


def test_fit_learns_digits(digits: DataSet, convert: Convert) -> None:
    torch.manual_seed(0)
    model, batches = build_architecture("digits"), digits.train_batches(100, seed=0)
    validation = digits.validation_batches()
    rows = fit(model, batches, settings(epochs=6, lr=3e-3), validation=validation).epochs
    assert rows[-1].nll < 0.3 * rows[0].nll
    assert rows[-1].error is not None
    assert rows[-1].error < 10.0
    config = settings(epochs=5, lr=1e-3, lr_log_sigma2=0.05, beta=0.2)
    result = fit(convert(model), batches, config, validation=validation, threshold=3.0)
    first, last = result.epochs[0], result.epochs[-1]
    assert last.kl < 0.8 * first.kl
    assert last.nll < 1.0
    assert last.error is not None
    assert last.error < 15.0
    assert last.sparsity is not None
    assert first.sparsity is not None
    assert last.sparsity > first.sparsity
    assert result.model is model
    assert not model.training
    assert result.is_main


def test_fit_trains_a_plain_network(small_batches: TensorBatches, make_network: Make) -> None:
    model = make_network()
    rows = fit(model, small_batches, settings(epochs=15, lr=0.03)).epochs
    assert [row.kl for row in rows] == [0.0] * 15
    assert [row.sparsity for row in rows] == [None] * 15
    assert rows[-1].nll < 0.7 * rows[0].nll


def test_fit_rows_are_complete(small_batches: TensorBatches, make_network: Make, convert: Convert) -> None:
    model, listener = convert(make_network(), -2.0), Recorder()
    config = settings(epochs=8, lr=0.01, beta=2.0, warmup_epochs=5)
    validation = TensorBatches(small_batches.inputs, small_batches.labels, 5)
    result = fit(model, small_batches, config, validation=validation, threshold=0.5, listener=listener)
    rows = result.epochs
    assert [row.epoch for row in rows] == list(range(1, 9))
    # the warm-up takes at most half of the epochs: 4, not 5
    assert [row.beta for row in rows] == pytest.approx([0, 0.5, 1, 1.5, 2, 2, 2, 2])
    assert [row.learning_rate for row in rows] == pytest.approx([0.01 * (1 - done / 8) for done in range(8)])
    assert all(row.seconds > 0 and row.examples_per_second > 0 for row in rows)
    assert listener.rows == [(row, 8) for row in rows]
    assert listener.steps == [(epoch, step, 3, 4) for epoch in range(1, 9) for step in (1, 2, 3)]
    masks = [p.log_alpha() >= 0.5 for p in find_posteriors(model)]
    assert rows[-1].sparsity == pytest.approx(sum(int(mask.sum()) for mask in masks) / 56)
    assert 0 < rows[-1].sparsity < 1
    assert rows[-1].error == pytest.approx(masked_error(model, masks, validation))
    whole = masked_error(model, [torch.zeros_like(mask) for mask in masks], validation)
    assert measure_error(model, validation) == pytest.approx(whole)  # the threshold was for the log alone


@torch.no_grad()
def masked_error(model: nn.Module, masks: list[Tensor], batches: TensorBatches) -> float:
    hidden = F.linear(batches.inputs, model[0].weight * ~masks[0], model[0].bias).relu()
    logits = F.linear(hidden, model[2].weight * ~masks[1], model[2].bias)
    return 100 * (logits.argmax(1) != batches.labels).double().mean().item()


@pytest.mark.parametrize(("kinds", "expected"), [("weights", 1.0), ("gates", 6.0), ("weights gates", 1.0)])
def test_fit_tempers_the_kl_of_gates_alone(
    small_batches: TensorBatches, make_network: Make, convert: Convert, kinds: str, expected: float
) -> None:
    model = make_network()
    if "weights" in kinds:
        convert(model)
    if "gates" in kinds:
        attach_gate_(model[0], InputGate([ChannelGate(5, -1.0)], torch.arange(5), -1))
    assert fit(model, small_batches, settings(warmup_epochs=0)).epochs[-1].beta == expected
    assert fit(model, small_batches, settings(warmup_epochs=0, beta=2.5)).epochs[-1].beta == 2.5


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("constant", [1, 1, 1, 1]),
        ("cosine", [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_fit_rates_follow_the_schedule(
    small_batches: TensorBatches, make_network: Make, schedule: str, factors: list[float]
) -> None:
    rows = fit(make_network(), small_batches, settings(epochs=4, lr=0.1, schedule=schedule)).epochs
    assert [row.learning_rate for row in rows] == pytest.approx([0.1 * factor for factor in factors])


@pytest.mark.parametrize(("schedule", "steps"), [("linear", 2.5), ("constant", 4.0)])
def test_fit_steps_follow_the_schedule(schedule: str, steps: float) -> None:
    # where the gradient never changes, each of Adam's steps is the rate
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    config = settings(epochs=4, lr=0.01, schedule=schedule)
    fit(model, [(torch.ones(2, 1), torch.zeros(2))], config, loss=lambda output, target: output.mean())
    assert before - model.weight.item() == pytest.approx(0.01 * steps, rel=1e-4)


def test_fit_moves_each_role_at_its_own_rate(make_network: Make, convert: Convert) -> None:
    # Adam's first step is the rate times the sign of the gradient
    model, gate = convert(make_network(), -1.0), ChannelGate(5, -1.0)
    attach_gate_(model[0], InputGate([gate], torch.arange(5), -1))
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    batch = [(torch.randn(6, 5), torch.arange(6) % 3)]
    config = settings(epochs=1, lr=1e-4, lr_log_sigma2=2e-3, lr_gates=5e-2, warmup_epochs=0, beta=3.0)
    fit(model, batch, config)
    expected = {"weight": 1e-4, "bias": 1e-4, "log_sigma2": 2e-3, "gate.theta": 5e-2, "gate.log_sigma2": 5e-2}
    for name, tensor in model.named_parameters():
        key = name.rpartition(".")[2]
        rate = expected[f"gate.{key}" if "input_gate" in name else key]
        assert (tensor - before[name]).abs().median().item() == pytest.approx(rate, rel=1e-3), name


def test_fit_reports_nll_and_kl_of_the_set(
    small_batches: TensorBatches, make_network: Make, convert: Convert
) -> None:
    plain, model = make_network(), convert(make_network(), -40.0)
    (row,) = fit(model, small_batches, FitConfig(epochs=1, **STILL)).epochs
    assert row.nll == pytest.approx(F.cross_entropy(plain(small_batches.inputs), small_batches.labels).item())
    kl = sum((0.5 * torch.log1p(layer.weight.double() ** 2 / math.exp(-40))).sum() for layer in plain[::2])
    assert row.kl == pytest.approx(kl.item() / 12, rel=1e-5)
    (given,) = fit(model, small_batches, FitConfig(epochs=1, **STILL), num_data=60).epochs
    assert given.kl == pytest.approx(kl.item() / 60, rel=1e-5)


@pytest.mark.parametrize(("stronger", "weaker"), [({"beta": 30.0}, {"beta": 0.0}), ({"prior": "vd"}, {})])
def test_fit_uses_beta_and_prior(
    small_batches: TensorBatches, make_network: Make, convert: Convert, stronger: dict, weaker: dict
) -> None:
    def final_kl(options: dict) -> float:
        config = settings(epochs=10, lr=0.05, lr_log_sigma2=0.05, warmup_epochs=0, **options)
        model = convert(make_network(), -2.0)
        fit(model, small_batches, config)
        return sum(p.log_alpha().exp().reciprocal().log1p().sum().item() for p in find_posteriors(model))

    assert final_kl(stronger) < 0.9 * final_kl(weaker)


def test_fit_is_decided_by_its_seed(
    small_batches: TensorBatches, make_network: Make, convert: Convert
) -> None:
    def run(seed: int, noise: int) -> Tensor:
        model = convert(make_network(), -1.0)
        torch.manual_seed(noise)
        fit(model, small_batches, settings(seed=seed))
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(run(0, 1), run(0, 2))
    assert not torch.equal(run(0, 1), run(1, 1))


def test_fit_keeps_exactly_the_zero_weights(small_batches: TensorBatches, make_network: Make) -> None:
    def run(keep_zeros: bool) -> tuple[nn.Module, Tensor]:
        model = make_network()
        with torch.no_grad():
            model[0].weight[:, ::2] = 0.0
            model[0].bias.zero_()
        zero = model[0].weight == 0
        fit(model, small_batches, settings(epochs=3, lr=0.01), keep_zeros=keep_zeros)
        return model, zero

    model, zero = run(keep_zeros=True)
    assert torch.equal(model[0].weight == 0, zero)
    assert not (model[0].bias == 0).any()
    assert not (model[2].weight == 0).any()
    model, zero = run(keep_zeros=False)
    assert not (model[0].weight == 0).any()


def test_fit_keeps_the_zeros_of_a_bias_that_has_others(
    small_batches: TensorBatches, make_network: Make
) -> None:
    # what cutting adds to a layer without a bias: constants for some outputs, 0 for the rest
    model = make_network()
    with torch.no_grad():
        model[0].bias[1:] = 0.0
    fit(model, small_batches, settings(epochs=3, lr=0.01), keep_zeros=True)
    assert (model[0].bias == 0).tolist() == [False] + [True] * (len(model[0].bias) - 1)


def test_fit_logs_the_weight_that_the_kl_had(
    small_batches: TensorBatches, make_network: Make, convert: Convert
) -> None:
    options = settings(epochs=4, beta=3.0, warmup_epochs=2)
    converted = fit(convert(make_network()), small_batches, options)
    assert [row.beta for row in converted.epochs] == [0.0, 1.5, 3.0, 3.0]
    plain = fit(make_network(), small_batches, options)
    assert [(row.kl, row.beta) for row in plain.epochs] == 4 * [(0.0, 0.0)]


def test_fit_leaves_no_gradients_behind(small_batches: TensorBatches, make_network: Make) -> None:
    model = make_network()
    fit(model, small_batches, settings())
    assert [parameter.grad for parameter in model.parameters()] == 4 * [None]


def test_fit_for_no_epochs_changes_nothing(small_batches: TensorBatches, make_network: Make) -> None:
    model = make_network()
    result = fit(model, small_batches, settings(epochs=0), validation=small_batches)
    assert result.epochs == ()
    assert all(map(torch.equal, model.parameters(), make_network().parameters()))


def test_fit_clips_the_gradient(small_batches: TensorBatches, make_network: Make) -> None:
    # Adam divides by the gradient's size, unless it is far below its epsilon of 1e-8
    model = make_network()
    fit(model, small_batches, settings(lr=0.1, clip_norm=1e-14))
    pairs = zip(model.parameters(), make_network().parameters(), strict=True)
    assert max((ours - theirs).abs().max().item() for ours, theirs in pairs) < 1e-5


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "16-mixed"])
def test_fit_in_other_precisions(
    small_batches: TensorBatches, make_network: Make, convert: Convert, precision: str
) -> None:
    model = convert(make_network())
    config = settings(epochs=10, lr=0.03, precision=precision, clip_norm=5.0)
    rows = fit(model, small_batches, config, validation=small_batches).epochs
    assert rows[-1].nll < 0.9 * rows[0].nll
    exact = fit(convert(make_network()), small_batches, settings(epochs=10, lr=0.03)).epochs
    assert rows[0].kl == pytest.approx(exact[0].kl, rel=0.02)
    assert rows[0].nll == pytest.approx(exact[0].nll, rel=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # as it came


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed"])
def test_fit_on_cuda(
    small_batches: TensorBatches, make_network: Make, convert: Convert, precision: str
) -> None:
    model, before = convert(make_network()), torch.cuda.get_rng_state()
    config = settings(epochs=10, lr=0.03, precision=precision, clip_norm=5.0, device="cuda")
    rows = fit(model, small_batches, config, validation=small_batches).epochs
    assert rows[-1].nll < 0.9 * rows[0].nll
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_fit_takes_a_run_configuration(small_batches: TensorBatches, make_network: Make) -> None:
    assert len(fit(make_network(), small_batches, RunConfig(epochs=1, device="cpu")).epochs) == 1


def test_the_log_weighs_examples_alike_whatever_the_last_batch_holds(make_network: Make) -> None:
    torch.manual_seed(1)
    inputs, labels = torch.randn(9, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    batches = [(inputs[:8], labels[:8]), (100 * inputs[8:], labels[8:])]
    model = make_network().requires_grad_(False)
    model[0].weight.requires_grad_(True)
    (row,) = fit(model, batches, FitConfig(epochs=1, lr=1e-12, device="cpu")).epochs
    whole = torch.cat([batch for batch, _ in batches])
    with torch.no_grad():
        losses = F.cross_entropy(model(whole), labels, reduction="none")
    assert abs(losses[8] - losses[:8].mean()) > 1
    assert row.nll == pytest.approx(float(losses.mean()), rel=1e-4)
