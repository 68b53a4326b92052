"""What decides the values that a layer reads: constants are folded only where nothing else does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.compare import EXACT, relative_difference
from vbdcompress.conversion import Converted, convert
from vbdcompress.slimming import slim
from vbdcompress.surgery.influence import DECISION, INPUT, find_influences
from vbdcompress.surgery.verify import find_groups
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class TwoLayers(nn.Module):
    """Linear layers `a` and `b` with something of the test's between them."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sets, 5] -> [batch, sets, 4], or without the sets."""
        result: Tensor = self.b(self.between(torch.relu(self.a(x)), x))
        return result


def masked_sum(h: Tensor, x: Tensor) -> Tensor:
    return (h * (x.abs().sum(-1, keepdim=True) > 0)).sum(1)


def masked_fill(h: Tensor, x: Tensor) -> Tensor:
    return h.masked_fill((x == 0).all(-1, keepdim=True), -7.0)


def of_detached(h: Tensor, _: Tensor) -> Tensor:
    return h * h.detach().mean(-1, keepdim=True)


def without_gradient(h: Tensor, _: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.mean(-1, keepdim=True)
    return h * scale


def of_sign(h: Tensor, _: Tensor) -> Tensor:
    return h * torch.sign(h.sum(-1, keepdim=True) - 1e3)


def written_in_place(h: Tensor, x: Tensor) -> Tensor:
    filled = torch.ones_like(h)
    filled[..., :8] = h
    filled[x[..., 0] == 0] = 3.0
    return filled


def at_a_look(h: Tensor, x: Tensor) -> Tensor:
    return h if bool((x != 0).any(-1).all()) else h + 5 * (x == 0).all(-1, keepdim=True)


HIDDEN = [masked_sum, masked_fill, of_detached, without_gradient, of_sign, written_in_place, at_a_look]


def lose_writers(converted: Converted) -> Converted:
    """`a` loses all weights into half of its outputs, and nothing else goes."""
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.fill_(-30.0)
        if posterior.name == "a.weight":
            posterior.log_sigma2.data[:4] = 60.0
    return converted


def masked(converted: Converted) -> nn.Module:
    set_threshold_(converted.model, 3.0)
    return converted.model.eval().double()


@pytest.mark.parametrize("between", HIDDEN)
def test_what_the_example_does_not_show_is_not_folded(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = TwoLayers(between)
    nn.init.constant_(model.a.bias, 1.0)
    converted = lose_writers(convert(model, torch.randn(2, 6, 5), "weights"))
    small = slim(converted, 3.0).model.double()
    padded = 30 * torch.randn(3, 6, 5, dtype=torch.float64)
    padded[:, 3:] = 0
    with torch.no_grad():
        expected, found = masked(converted)(padded), small(padded)
    # weights are float32 by then
    assert relative_difference([expected], [found]) < 1e-6


PLAIN: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda h, _: h,
    lambda h, _: F.gelu(h).clamp(max=3.0),
    lambda h, _: h.mean(1),
    lambda h, x: h + x.new_full((1,), 0.5) + torch.zeros_like(x[..., :1]),
    lambda h, _: F.dropout(h, 0.5, training=False).transpose(1, 2).contiguous().transpose(1, 2),
]


@pytest.mark.parametrize("between", PLAIN)
def test_what_nothing_else_decides_is_folded(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = TwoLayers(between)
    converted = lose_writers(convert(model, torch.randn(2, 6, 5), "weights"))
    cut = slim(converted, 3.0)
    assert cut.model.a.out_features == 4
    inputs = torch.randn(3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        expected, found = masked(converted)(inputs), cut.model.double()(inputs)
    assert relative_difference([expected], [found]) < 1e-6


@pytest.mark.parametrize("build", ["squeeze", "attention"])
def test_gates_and_attention_are_decided_by_their_writers(build: str) -> None:
    if build == "squeeze":

        class Squeeze(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                h = torch.relu(self.conv(x))
                result: Tensor = self.head(h * self.gate(h.mean((2, 3)))[..., None, None].sigmoid())
                return result

        scan = find_groups(Squeeze(), torch.randn(2, 3, 6, 6))
    else:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        converted = convert(nn.Sequential(nn.Linear(5, 8), layer), torch.randn(2, 7, 5), "weights")
        scan = converted.scan
    assert scan.removable
    assert all(group.foldable for group in scan.removable)


class Mixture(nn.Module):
    """Of two experts, by a number in the input: the example goes to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 16), nn.Linear(10, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 10) for _ in range(2))
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] -> [batch, 2]."""
        h = torch.relu(self.a(x))
        route, y = (x[:, 0] > 20).long(), x.new_zeros(len(x), 10)
        for number, expert in enumerate(self.experts):
            rows = (route == number).nonzero()[:, 0]
            if len(rows):
                y = y.index_put((rows,), expert(h[rows]))
        result: Tensor = self.last(self.out(torch.relu(y)))
        return result


def test_what_an_idle_layer_may_read_or_write_stays_whole() -> None:
    scan = find_groups(Mixture(), torch.randn(2, 5))
    whole = {group.name: group.whole_because for group in scan.groups}
    for name in ("a", "experts.0"):
        assert "'experts.1', which did not run on the example" in str(whole[name])
    assert whole["last.1"] is None  # of another width


class Chosen(nn.Module):
    """Two layers of unlike names, of which one runs where a large value is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.often, self.rarely = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] -> [batch, 3]."""
        h = torch.relu(self.stem(x))
        y: Tensor = self.head(torch.relu(self.rarely(h) if bool((x > 1000).any()) else self.often(h)))
        return y


def test_a_branch_that_the_example_does_not_take_keeps_its_widths() -> None:
    groups = {group.name: group for group in find_groups(Chosen(), torch.randn(2, 5)).groups}
    for name in ("stem", "often"):
        assert "'rarely', which did not run on the example" in str(groups[name].whole_because)


class Guarded(nn.Module):
    """Looks at values, and holds a layer of no use to anybody."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.a, self.b, self.old_head, self.at = nn.Linear(5, 16), nn.Linear(16, 4), nn.Linear(16, 9), at

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] -> [batch, 4]."""
        assert self.at != "start" or not bool(x.isnan().any())
        y: Tensor = self.b(torch.relu(self.a(x)))
        assert self.at != "end" or not bool(y.isnan().any())
        return y


@pytest.mark.parametrize("at", ["start", "end"])
def test_a_guard_and_a_layer_that_is_left_over_keep_nothing_whole(at: str) -> None:
    (group, _) = find_groups(Guarded(at), torch.randn(2, 5)).groups
    assert group.whole_because is None
    assert group.foldable == (at == "end")  # behind the last layer, a look decides none's input


def test_readers_name_what_their_input_was_made_of() -> None:
    model = TwoLayers(masked_sum).eval()
    found = find_influences(model, torch.randn(2, 6, 5))
    assert found.readers == {"a": {INPUT}, "b": {"a", INPUT, DECISION}}
    assert not found.branches
    assert found.read_elsewhere == set()
    assert find_influences(TwoLayers(at_a_look).eval(), torch.randn(2, 6, 5)).branches


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 8] -> [batch, 8]."""
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t())


def test_a_weight_that_is_used_twice_is_masked_twice() -> None:
    torch.manual_seed(0)
    model = Tied()
    assert find_influences(model.eval(), torch.randn(2, 8)).read_elsewhere == {"encoder"}
    converted = convert(model, torch.randn(2, 8), "weights")
    (row,) = (row for row in converted.table if row.name == "encoder.weight")
    assert row.action == "converted"
    (posterior,) = find_posteriors(converted.model)
    posterior.log_sigma2.data.fill_(-30.0)
    posterior.log_sigma2.data[:, 0] = 60.0
    small, inputs = slim(converted, 3.0).model, torch.randn(5, 8, dtype=torch.float64)
    assert small.encoder.weight[:, 0].eq(0).all()
    with torch.no_grad():
        difference = relative_difference([masked(converted)(inputs)], [small.double()(inputs)])
    assert difference < EXACT


@pytest.mark.parametrize(
    "extra", [lambda model: model.scale.exp(), lambda model: model.a.weight.square().sum()]
)
def test_a_number_beside_the_output_hides_no_channels(extra: Callable[[Any], Tensor]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(5, 8), nn.Linear(8, 4), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(torch.relu(self.a(x))), extra(self)

    scan = find_groups(Scaled(), torch.randn(2, 5))
    assert scan.failure is None
    penalised = bool(find_influences(Scaled().eval(), torch.randn(2, 5)).read_elsewhere)
    assert [group.name for group in scan.removable] == ([] if penalised else ["a"])
