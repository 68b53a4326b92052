"""Streams under norms that stay whole, and what else such norms are over: heads, gated units."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import Pattern, built, stream_layers
from torch import Tensor, nn

from vbdcompress.compare import EXACT, relative_difference
from vbdcompress.conversion import convert
from vbdcompress.errors import ConvertError
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

WIDTH = 8


def batch(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_stream_that_code_adds_to_stays_whole() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.words(x)
        return n.head(n.norm(y + torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)).mean(1))

    layers = {"words": nn.Linear(4, WIDTH), "norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 3)}
    with pytest.raises(ConvertError, match="'words' stays whole: cutting its channels changes the output"):
        convert(built(lambda: Pattern(run, **layers)), batch(2))


def test_a_norm_says_whom_it_follows() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.of_time(n.words(x).mT).mT
        y = n.one(y).relu()
        return n.head(n.last(n.wide(y)).mean(1))

    layers = {"words": nn.Linear(4, WIDTH), "wide": nn.Linear(WIDTH, 12), "head": nn.Linear(12, 3)}
    norms = {"of_time": nn.LayerNorm(5), "one": nn.LayerNorm(WIDTH), "last": nn.LayerNorm(12)}
    rows = convert(built(lambda: Pattern(run, **layers, **norms)), batch(2)).table
    told = {row.name: row.reason for row in rows}
    assert told["of_time"] == "no layer's channels go through it one by one"
    assert told["one"] == "follows 'words', which stays whole"
    assert told["last"] == "follows its group"


def kept_whole(of: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether a stream that goes through a function stays whole; what goes is cut exactly."""

    def run(n: Any, x: Tensor) -> Tensor:
        x = n.words(x)
        return n.head(n.last(of(n, x + n.narrow(F.gelu(n.wide(n.one(x)))))).mean(1))

    def build() -> nn.Module:
        return Pattern(run, one=nn.LayerNorm(WIDTH), last=nn.RMSNorm(WIDTH), **stream_layers(WIDTH))

    converted = convert(built(build), batch(6))
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data[[1, 2, 6]] = 60.0
    slimmed, x = slim(converted, 50.0), batch(5, 1)
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        assert relative_difference([converted.model.eval()(x)], [slimmed.model(x)]) <= EXACT
    (row,) = (row for row in slimmed.groups if row.name == "words")
    return row.whole_because is not None


def nearest(_: Any, x: Tensor) -> Tensor:
    near = torch.cdist(x, x).topk(2, largest=False).indices[..., 1:]
    return x + x.gather(1, near.expand(-1, -1, x.shape[-1]))


# What reads a stream and has no derivative, or goes past hooks, and what only looks so
UNSEEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "a mask of it": (lambda _, x: x * (x.sum(-1, keepdim=True) > 0), True),
    "its nearest places": (nearest, True),
    "a norm past its hooks": (lambda n, x: x + n.one.forward(x), True),
    "a norm by name": (lambda n, x: x + n.last(x=x), False),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_stream_stays_where_cut_channels_would_be_seen(name: str) -> None:
    of, stays = UNSEEN[name]
    assert kept_whole(of) == stays


class OwnRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@pytest.mark.parametrize("norm", [OwnRMSNorm, nn.LayerNorm], ids=["own", "of torch"])
def test_norms_of_each_head_keep_no_head(norm: Callable[[int], nn.Module]) -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        x = n.words(x)
        y = n.one(x)
        q, k, v = (layer(y).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (n.q, n.k, n.v))
        y = F.scaled_dot_product_attention(n.of_q(q), n.of_k(k), v).transpose(1, 2).flatten(2)
        return n.head(n.last(x + n.out(y)).mean(1))

    def build() -> nn.Module:
        q, k, v = (nn.Linear(WIDTH, 12) for _ in range(3))
        ends = {"words": nn.Linear(4, WIDTH), "out": nn.Linear(12, WIDTH), "head": nn.Linear(WIDTH, 3)}
        norms = {"one": nn.LayerNorm(WIDTH), "last": norm(WIDTH), "of_q": norm(4), "of_k": norm(4)}
        return Pattern(run, q=q, k=k, v=v, **ends, **norms)

    removable = {group.name: group.size for group in convert(built(build), batch(2)).scan.removable}
    assert removable == {"words": WIDTH, "q": 3}


def test_what_meets_in_each_place_before_a_norm_goes_together() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        return n.head(n.norm(F.glu(n.words(x))).mean(1))

    def build() -> nn.Module:
        return Pattern(run, words=nn.Linear(4, 2 * WIDTH), norm=nn.LayerNorm(WIDTH), head=nn.Linear(WIDTH, 3))

    (group,) = convert(built(build), batch(2)).scan.removable
    assert (group.name, group.size) == ("words", WIDTH)
