"""The error of a network on a set, and moving batches to where it lies."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.errors import DataError
from vbdcompress.evaluation import (
    cross_entropy,
    device_of,
    measure_error,
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


def test_whole_float32_holds_on_a_gpu_for_as_long_as_it_is_asked_for() -> None:
    conv = getattr(torch.backends.cudnn, "conv", None)  # torch 2.9 and newer

    def settings() -> tuple[bool, str | None]:
        return torch.backends.cudnn.allow_tf32, conv and conv.fp32_precision

    before = settings()
    assert before[0]
    with whole_float32(torch.device("cuda")):
        assert conv.fp32_precision == "ieee" if conv else not torch.backends.cudnn.allow_tf32
    assert settings() == before
    with pytest.raises(KeyError), whole_float32(torch.device("cuda")):
        raise KeyError
    assert settings() == before
    with whole_float32(torch.device("cpu")):
        assert settings() == before
