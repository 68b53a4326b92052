"""The error of a network on a set, and moving batches to where it lies."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress import evaluation
from vbdcompress.errors import DataError
from vbdcompress.evaluation import (
    cross_entropy,
    device_of,
    measure_error,
    name_of,
    to_device,
    top1_error,
    whole_float32,
)

META = torch.device("meta")


class Pair(NamedTuple):
    first: Any
    second: Any


def test_to_device_reaches_every_tensor() -> None:
    moved = to_device({"a": [torch.ones(1), "word"], "b": Pair(torch.ones(2), (torch.ones(3), 4))}, META)
    assert moved["a"][0].is_meta
    assert moved["a"][1] == "word"
    assert isinstance(moved["b"], Pair)
    assert moved["b"].first.is_meta
    assert moved["b"].second[0].is_meta
    assert moved["b"].second[1] == 4


def test_to_device_casts_floating_point_alone() -> None:
    moved = to_device({"a": [torch.ones(1)], "b": torch.ones(2, dtype=torch.int32)}, META, torch.float64)
    assert moved["a"][0].dtype == torch.float64
    assert moved["b"].dtype == torch.int32


def test_cross_entropy_is_the_mean_in_nats() -> None:
    output, target = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    probabilities = output.exp() / output.exp().sum(1, keepdim=True)
    expected = -sum(probabilities[row, label].log() for row, label in enumerate(target.tolist())) / 5
    assert cross_entropy(output, target).item() == pytest.approx(float(expected), rel=1e-5)


def test_measure_error_weighs_examples_alike() -> None:
    # 1 of 3 wrong, then 1 of 1: half of all, not two thirds
    logits = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    batches = [(logits[:3], torch.tensor([0, 1, 1])), (logits[3:], torch.tensor([2]))]
    assert measure_error(nn.Identity(), batches) == 50.0
    assert top1_error(*batches[0]).tolist() == [0.0, 0.0, 1.0]


def test_measure_error_takes_another_metric() -> None:
    def far(output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).abs().clamp(max=1)

    assert measure_error(nn.Identity(), [(torch.ones(4, 1), torch.tensor([1.0, 0.5, 3, 1]))], far) == 37.5


@pytest.mark.parametrize("training", [True, False])
def test_measure_error_measures_in_eval_mode_and_puts_the_mode_back(training: bool) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watch(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return input

    model = Watch().train(training)
    measure_error(model, [(torch.eye(2), torch.tensor([0, 1]))])
    assert seen == [(False, False)]
    assert model.training is training


def test_measure_error_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="no batch came"):
        measure_error(nn.Identity(), [])


def test_device_of_a_network() -> None:
    assert device_of(nn.Linear(1, 1, device="meta")) == META
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")) == META
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_cross_entropy_refuses_several_outputs():
    with pytest.raises(DataError, match=r"(?s)gives a tuple in training mode.*aux_logits=False"):
        cross_entropy((torch.zeros(2, 3), torch.zeros(2, 3)), torch.tensor([0, 1]))


CUDNN = torch.backends.cudnn
# torch 2.9 and newer
PARTS = [getattr(CUDNN, name) for name in ("conv", "rnn") if hasattr(CUDNN, name)]


def precisions() -> list[str]:
    return [part.fp32_precision for part in PARTS]


def test_whole_float32_holds_on_a_gpu_for_as_long_as_it_is_asked_for() -> None:
    before = precisions()
    assert CUDNN.allow_tf32
    with whole_float32(torch.device("cuda")):
        assert not CUDNN.allow_tf32
        assert precisions() == len(PARTS) * ["ieee"]
        with CUDNN.flags(enabled=True, deterministic=True, allow_tf32=False):  # as a network's code may
            pass
    assert (CUDNN.allow_tf32, precisions()) == (True, before)
    with pytest.raises(KeyError), whole_float32(torch.device("cuda")):
        raise KeyError
    assert (CUDNN.allow_tf32, precisions()) == (True, before)
    with whole_float32(torch.device("cpu")):
        assert (CUDNN.allow_tf32, precisions()) == (True, before)


@pytest.mark.skipif(not PARTS, reason="torch before 2.9 has one setting for all")
def test_whole_float32_puts_back_what_a_user_set_for_one_kind_of_layer() -> None:
    before = precisions()
    try:
        PARTS[0].fp32_precision = "ieee"
        mixed = precisions()
        with whole_float32(torch.device("cuda")):
            assert precisions() == len(PARTS) * ["ieee"]
        assert precisions() == mixed != before
    finally:
        CUDNN.allow_tf32 = True
        for part, precision in zip(PARTS, before, strict=True):
            part.fp32_precision = precision


@pytest.mark.parametrize("new", [False, True])
def test_matrix_products_are_whole_too_whichever_setting_the_user_chose(new: bool) -> None:
    matmul = torch.backends.cuda.matmul
    if new and not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one setting for all")
    chosen = getattr(matmul, "fp32_precision", None)
    try:
        if new:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        with whole_float32(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"  # it raises where the new one differs
        if new:
            assert matmul.fp32_precision == "tf32"
        else:
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        if chosen is not None:
            matmul.fp32_precision = chosen


def test_errors_are_measured_in_whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def noting(device: torch.device) -> AbstractContextManager[None]:
        asked.append(device)
        return nullcontext()

    monkeypatch.setattr(evaluation, "whole_float32", noting)
    measure_error(nn.Linear(2, 2), [(torch.randn(3, 2), torch.tensor([0, 1, 0]))])
    assert asked == [torch.device("cpu")]


def test_errors_beyond_0_and_1_are_named_wherever_they_come():
    good = torch.zeros(4), torch.zeros(4)
    bad = torch.zeros(4), torch.tensor([0.0, 1.0, 3.0, -1.0])
    with pytest.raises(DataError, match=r"below 0 or above 1 for 2 of 8 examples"):
        measure_error(nn.Identity(), [good, bad], lambda output, target: target, bounded=True)
    assert measure_error(nn.Identity(), [good, bad], lambda output, target: target) == 100 * 3 / 8


def test_a_judge_is_called_by_its_function_and_what_a_partial_gives_it():
    top_two = functools.partial(F.cross_entropy, torch.rand(2), label_smoothing=0.1, reduction="none")
    assert name_of(F.cross_entropy) == "cross_entropy"
    assert name_of(top_two) == "cross_entropy(label_smoothing=0.1, reduction='none')"
    assert name_of(nn.MSELoss()) == "MSELoss"
    # what an object is called says where it lies, in this process alone
    assert name_of(functools.partial(F.cross_entropy, 3, weight=object())) == "cross_entropy(3)"


def test_a_cut_network_whose_metric_is_no_number_errs_wholly() -> None:
    def correlation(output: Tensor, target: Tensor) -> Tensor:
        return (0 / output.std() + (output - target).abs().mean()).expand(len(target))

    batches = [(torch.ones(4, 1), torch.zeros(4, 1))]
    assert measure_error(nn.Identity(), batches, correlation) == 100.0
    with pytest.raises(DataError, match="mean over 4 values is nan"):
        measure_error(nn.Identity(), batches, correlation, bounded=True)
