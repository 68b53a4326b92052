"""Networks that keep in eval mode what they computed of their weights are cut as if they did not."""

from typing import Any

import pytest
import torch
from small_networks import EXAMPLE, assert_cut_exactly, assert_groups, built, switch_off_
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.slimming import slim


class Biased(nn.Module):
    """As LeViT's: heads with a bias for each pair of positions, looked up once in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, self.kept = 4, 3, dict[str, Tensor]()
        self.qkv, self.out = nn.Linear(3, 3 * 12), nn.Linear(12, 5)
        self.biases = nn.Parameter(torch.randn(4, 64))
        distances = (torch.arange(64)[:, None] - torch.arange(64)[None]).abs()
        self.register_buffer("pairs", distances)

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        given = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(given).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        biases = self.biases[:, self.pairs]
        if not self.training:
            biases = self.kept.setdefault("biases", biases)
        weights = (q @ k.transpose(-2, -1) + biases).softmax(-1)
        y: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2).mean(1))
        return y


class Doubled(nn.Module):
    """Keeps twice its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.kept = nn.Parameter(torch.randn(5, 3)), dict[str, Tensor]()

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        twice = 2 * self.weights
        if not self.training:
            twice = self.kept.setdefault("twice", twice)
        return x.mean((2, 3)) @ twice.t()


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_tables_that_a_network_keeps_follow_its_weights(mode: str, called: bool) -> None:
    model = built(Biased)
    if called:
        with torch.no_grad():
            model(EXAMPLE.double())
    assert_groups(model, {"qkv": 4})
    assert_cut_exactly(model, mode)


@torch.no_grad()
def test_a_plain_copy_forgets_what_was_computed_at_another_threshold() -> None:
    converted = convert(built(Doubled), EXAMPLE.double(), "weights")
    before = converted.model.eval()(EXAMPLE.double())
    switch_off_(converted.model)
    masked = converted.plain(50.0)
    fresh = built(Doubled)
    fresh.load_state_dict(masked.state_dict())
    assert torch.equal(masked(EXAMPLE.double()), fresh(EXAMPLE.double()))
    assert not torch.equal(masked(EXAMPLE.double()), before)


def test_a_slim_network_keeps_no_table_in_another_precision() -> None:
    model = built(Biased).float()
    converted = convert(model, EXAMPLE)
    switch_off_(converted.model)
    slimmed = slim(converted, 50.0).model
    assert slimmed(EXAMPLE).dtype == torch.float32
    assert slimmed.heads < 4


class Table(nn.Module):
    """Builds its table as it goes to eval mode, and drops it as it goes to training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.table = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6)), None
        self.weight, self.places = nn.Parameter(torch.randn(5, 6)), torch.arange(5)

    def train(self, mode: bool = True) -> Any:
        self.table = None if mode else (2 * self.weight).detach()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x.mean((2, 3)))
        return y @ (2 * self.weight if self.table is None else self.table).t()


def test_a_converted_network_in_training_mode_still_trains_after_a_cut() -> None:
    converted = convert(built(Table), EXAMPLE.double())
    converted.model.train()
    slim(converted, 50.0)
    assert converted.model.training
    converted.model(EXAMPLE.double()).sum().backward()
    assert converted.model.weight.grad is not None
