"""Streams under norms: gates of any sign, groups that lose all they have, tokens that no layer writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import Pattern, built, stream_layers
from torch import Tensor, nn

from vbdcompress.compare import EXACT, relative_difference
from vbdcompress.conversion import Converted, convert
from vbdcompress.slimming import slim
from vbdcompress.surgery.groups import ChannelGroup
from vbdcompress.surgery.silence import HEARD
from vbdcompress.vbd.gates import ChannelGate
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

WIDTH = 8


def tied(of: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    """A table of 11 words that the head shares, with a block; `of` is what follows."""

    def run(n: Any, x: Tensor) -> Any:
        x = n.words(x)
        return of(n, x + n.narrow(F.gelu(n.wide(n.one(x)))))

    def build() -> nn.Module:
        layers = stream_layers(WIDTH) | {"words": nn.Embedding(11, WIDTH), "value": nn.Linear(WIDTH, 2)}
        norms = {name: nn.LayerNorm(WIDTH) for name in ("one", "last", "other")}
        model = Pattern(run, **(layers | {"head": nn.Linear(WIDTH, 11, bias=False)}), **norms)
        model.head.weight = model.words.weight
        return model

    return build


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(11, (count, 5), generator=torch.Generator().manual_seed(seed))


def group_of(converted: Converted, name: str) -> ChannelGroup:
    return next(group for group in converted.scan.groups if group.name == name)


def gate_of(converted: Converted, name: str) -> ChannelGate:
    return next(m for m in converted.model.modules() if isinstance(m, ChannelGate) and m.name == name)


@pytest.mark.parametrize(
    ("of", "goes"),
    [
        (lambda n, h: n.head(n.last(h)), True),
        (lambda n, h: n.head(-n.last(h).mean(1)), True),
        (lambda n, h: n.head(n.last(h).amax(1)), False),
        (lambda n, h: n.head(n.last(h).relu()), False),
        (lambda n, h: n.head(n.last(h).abs()), False),
    ],
    ids=["plain", "mean", "largest", "relu", "size"],
)
def test_gates_below_0_go_into_a_norm_where_nothing_looks_at_signs(
    of: Callable[[Any, Tensor], Tensor], goes: bool
) -> None:
    converted = convert(built(tied(of)), ids(4))
    assert (group_of(converted, "words").whole_because is None) == goes
    if goes:
        gate, x = gate_of(converted, "words"), ids(6, 1)
        with torch.no_grad():
            gate.theta[::2] *= -1
            gate.log_sigma2[[1, 2]] = 60.0
            slimmed = slim(converted, 50.0)
            set_threshold_(converted.model, 50.0)
            assert relative_difference([converted.model.eval()(x)], [slimmed.model(x)]) <= EXACT


@pytest.mark.parametrize("head_first", [True, False])
def test_gates_go_into_the_norm_before_the_head_whatever_runs_last(head_first: bool) -> None:
    def of(n: Any, h: Tensor) -> Any:
        if head_first:
            return n.head(n.last(h)), n.value(n.other(h))
        value = n.value(n.other(h))
        return n.head(n.last(h)), value

    converted = convert(built(tied(of)), ids(4))
    assert group_of(converted, "words").takers == (("head", "last"),)
    gate, x = gate_of(converted, "words"), ids(6, 1)
    gate.log_sigma2.data[[1, 2, 6]] = 60.0
    slimmed = slim(converted, 50.0)
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        assert relative_difference([*converted.model.eval()(x)], [*slimmed.model(x)]) <= EXACT
    assert slimmed.model.words.weight.shape == (11, WIDTH - 3)


def beside(of: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A norm over what a function makes of one layer, and over another layer's channels."""

    def run(n: Any, x: Tensor) -> Tensor:
        return n.head(n.norm(torch.cat([of(n, n.a(x)), n.b(x)], -1)).mean(1))

    layers = {"a": nn.Linear(4, WIDTH), "b": nn.Linear(4, WIDTH), "bare": nn.BatchNorm1d(5, affine=False)}
    ends = {"norm": nn.LayerNorm(2 * WIDTH), "head": nn.Linear(2 * WIDTH, 3)}
    return lambda: Pattern(run, **layers, **ends)


def batch(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("of", "silent"),
    [
        (lambda _, a: a.relu(), True),
        (lambda _, a: F.gelu(a), True),
        (lambda _, a: a * a.sigmoid(), True),
        (lambda _, a: a.sigmoid(), False),
        (lambda _, a: F.softplus(a), False),
        (lambda _, a: a.cos(), False),
        (lambda _, a: 1 + a, False),
    ],
    ids=["relu", "gelu", "silu", "sigmoid", "softplus", "cos", "shift"],
)
@pytest.mark.parametrize("round_to", [1, 4])
def test_all_channels_go_or_none_where_a_norm_counts_them(
    of: Callable[[Any, Tensor], Tensor], silent: bool, round_to: int
) -> None:
    converted, x = convert(built(beside(of)), batch(6)), batch(5, 1)
    assert group_of(converted, "a").whole_because == (None if silent else HEARD)
    for posterior in find_posteriors(converted.model):
        gone = range(WIDTH) if posterior.name == "a" else range(2, 3)
        posterior.log_sigma2.data[list(gone)] = 60.0 + torch.arange(float(len(gone)), dtype=torch.float64)
    slimmed = slim(converted, 50.0, round_to=round_to)
    set_threshold_(converted.model, 50.0, round_to)
    with torch.no_grad():
        assert relative_difference([converted.model.eval()(x)], [slimmed.model(x)]) <= EXACT
    assert slimmed.model.a.out_features == (round_to if silent else WIDTH)


@pytest.mark.parametrize("of", [nn.Softplus, nn.Sigmoid, nn.ReLU])
def test_weights_that_write_and_read_a_counted_channel_go_exactly(of: Callable[[], nn.Module]) -> None:
    norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
    model = built(lambda: nn.Sequential(nn.Linear(4, WIDTH, bias=False), of(), norm, nn.Linear(WIDTH, 3)))
    converted, x = convert(model, batch(6), "weights"), batch(5, 1)
    for posterior in find_posteriors(converted.model):
        part = posterior.log_sigma2.data
        (part if posterior.name == "0.weight" else part.T)[[1, 2]] = 60.0
    slimmed = slim(converted, 50.0)
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        assert relative_difference([converted.model.eval()(x)], [slimmed.model(x)]) <= EXACT
    kept = WIDTH - 2 if of is nn.ReLU else WIDTH
    assert slimmed.model[0].out_features == kept


@pytest.mark.parametrize("first", [True, False])
def test_a_token_of_no_layer_makes_no_parts_of_a_stream(first: bool) -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = F.glu(n.words(x))
        token = n.token.expand(len(y), 1, -1)
        return n.head(n.norm(torch.cat([token, y] if first else [y, token], 1)).mean(1))

    def build() -> nn.Module:
        model = Pattern(
            run, words=nn.Linear(4, 2 * WIDTH), norm=nn.LayerNorm(WIDTH), head=nn.Linear(WIDTH, 3)
        )
        model.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        return model

    (group,) = convert(built(build), batch(6)).scan.removable
    assert (group.name, group.size) == ("words", WIDTH)
