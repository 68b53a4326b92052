"""A recurrent layer that was cut is cut again: each round by its own units."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vbdcompress.compare import relative_difference
from vbdcompress.conversion import convert
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class LastState(nn.Module):
    """What a classifier reads of a sequence."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.read, self.head = kind(4, 9, batch_first=True), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.read(x)[0][:, -1])
        return result


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_was_cut_is_cut_again(kind: Any) -> None:
    model: nn.Module = LastState(kind).double().eval()
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    for left in (7, 5):
        converted = convert(model, x)
        (gate,) = find_posteriors(converted.model)
        gate.log_sigma2.data[left:] = 60.0
        model = slim(converted, 50.0).model
        assert model.read.hidden_size == left
        converted.model.eval()
        set_threshold_(converted.model, 50.0)
        with torch.no_grad():
            assert relative_difference([converted.model(x)], [model(x)]) <= 1e-10
