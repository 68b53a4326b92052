"""A network's own dropout in a fit, seen from outside: how much of what went through it was zero."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from vbdcompress.attention import HeadAttention
from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches
from vbdcompress.dropout import scaled_dropout
from vbdcompress.errors import FitError
from vbdcompress.fitting import fit

WIDE = 2000


class Dropping(nn.Module):
    """Counts what its dropout lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.drop, self.head = nn.Linear(5, WIDE), nn.Dropout(0.5), nn.Linear(WIDE, 3)
        self.zeros: list[float] = []

    def forward(self, input: Tensor) -> Any:
        dropped = self.drop(self.wide(input))
        if self.training:
            self.zeros.append(float((dropped == 0).float().mean()))
        return self.head(dropped)


@pytest.mark.parametrize(
    ("taught", "options", "zeros"),
    [
        (True, {}, 0.0),
        (True, {"dropout": 1.0}, 0.5),
        (True, {"dropout": 0.5}, 0.25),
        (True, {"distill": 0.0}, 0.5),
        (False, {}, 0.5),
        (False, {"dropout": 0.0}, 0.0),
    ],
)
def test_a_fit_leaves_the_asked_share_of_dropout(
    small_batches: TensorBatches, taught: bool, options: dict[str, float], zeros: float
) -> None:
    model = Dropping()
    teacher = copy.deepcopy(model) if taught else None
    fit(model, small_batches, FitConfig(epochs=1, device="cpu", **options), teacher=teacher)
    assert len(model.zeros) == 3
    assert model.zeros == pytest.approx([zeros] * 3, abs=0.03)
    assert model.drop.p == 0.5


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_modules_that_drop_out_by_themselves(share: float) -> None:
    attention = nn.MultiheadAttention(8, 2, dropout=0.4)
    model = nn.ModuleList(
        [attention, HeadAttention(attention), nn.LSTM(4, 4, 2, dropout=0.4), nn.Dropout2d(0.4)]
    )
    model.append(StochasticDepth(0.4, "row"))
    rates: list[Callable[[], float]] = [lambda i=i: model[i].dropout for i in range(3)]  # type: ignore[misc]
    rates += [lambda i=i: model[i].p for i in (3, 4)]  # type: ignore[misc]
    with scaled_dropout(model, share):
        assert [rate() for rate in rates] == [0.4 * share] * 5
    assert [rate() for rate in rates] == [0.4] * 5


def test_an_lstm_without_dropout_repeats_itself() -> None:
    model, inputs = nn.LSTM(4, 4, 2, dropout=0.9).train(), torch.randn(6, 2, 4)
    with scaled_dropout(model, 0.0):
        assert torch.equal(model(inputs)[0], model(inputs)[0])
    assert not torch.equal(model(inputs)[0], model(inputs)[0])


def test_rates_come_back_from_a_fit_that_fails(small_batches: TensorBatches) -> None:
    model = Dropping()
    config = FitConfig(epochs=1, device="cpu", dropout=0.0)
    with pytest.raises(FitError, match="not finite"):
        fit(model, small_batches, config, loss=lambda output, _: output.sum() * float("nan"))
    assert model.zeros[0] == 0.0
    assert model.drop.p == 0.5


class Computed(nn.Dropout):
    """Says its rate itself: it can't be set."""

    @property
    def p(self) -> float:  # type: ignore[override]
        return 0.5

    @p.setter
    def p(self, value: float) -> None:
        if value != 0.5:
            raise AttributeError


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_rate_that_can_not_be_set_is_left(small_batches: TensorBatches, dropout: float) -> None:
    model = Dropping()
    model.drop = Computed(0.5)
    fit(model, small_batches, FitConfig(epochs=1, device="cpu", dropout=dropout))
    assert model.zeros == pytest.approx([0.5] * 3, abs=0.03)
