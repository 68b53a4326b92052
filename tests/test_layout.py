"""Channels last in memory, where the network's own code takes it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vbdcompress import compress
from vbdcompress.layout import lay_out_fast_


class Flat(nn.Module):
    """A convolution whose output is flattened as asked; `extra` only in training."""

    def __init__(self, way: str, extra: str | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.head, self.other = nn.Linear(6 * 16, 4), nn.Linear(6 * 16, 4)
        self.way, self.extra = way, extra

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 6, 6] -> [batch, 4]."""
        features = torch.relu(self.norm(self.conv(x)))
        logits: Tensor = self.head(getattr(features, self.way)(x.shape[0], -1))
        if self.training and self.extra is not None:
            logits = logits + self.other(getattr(features, self.extra)(x.shape[0], -1))
        return logits


def lies_last(model: Flat) -> bool:
    return model.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("way", "extra", "last"),
    [("reshape", None, True), ("view", None, False), ("reshape", "view", False)],
)
def test_channels_lie_last_where_the_code_runs_so(way: str, extra: str | None, last: bool) -> None:
    model = Flat(way, extra).train()
    before = copy.deepcopy(model.state_dict())
    lay_out_fast_(model, torch.randn(5, 3, 6, 6))
    assert lies_last(model) is last
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_fails_in_any_order_is_left_to_the_fit() -> None:
    model = Flat("reshape")
    lay_out_fast_(model, torch.randn(5, 2, 6, 6))
    assert not lies_last(model)


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_a_network_that_views_its_features_is_compressed(mode: str) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(20, 3, 6, 6), torch.randint(0, 4, (20,))) for _ in range(3)]
    options = {"epochs": 1, "finetune_epochs": 1, "device": "cpu", "mode": mode}
    result = compress(Flat("view"), batches, validation=batches, test=batches, **options)
    assert result.model(batches[0][0]).shape == (20, 4)


class Scaled(Flat):
    """Takes a number beside its images, and counts its training steps in a frozen parameter."""

    def __init__(self) -> None:
        super().__init__("reshape")
        self.steps = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        """[batch, 3, 6, 6] -> [batch, 4]."""
        if self.training:
            self.steps += 1
        return super().forward(x if by is None else x * by)


def test_the_trial_leaves_no_trace_and_no_number_stops_it() -> None:
    model = Scaled()
    lay_out_fast_(model, torch.randn(5, 3, 6, 6))
    assert lies_last(model)
    assert model.steps == 0
    lay_out_fast_(model, (torch.randn(5, 3, 6, 6), torch.tensor(2.0)))
    assert lies_last(model)
    lay_out_fast_(model, torch.randn(5, 4, 6, 6))  # what is wrong the fit will say
    assert not lies_last(model)
