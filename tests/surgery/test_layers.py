"""Layers that keep channels apart, or mix them, and outputs of several tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    EXAMPLE,
    Groups,
    Pattern,
    assert_cut_exactly,
    assert_groups,
    built,
    conv,
    pool,
    switch_off_,
)
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.slimming import slim


def encoder() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.block(m.a(x).flatten(2).transpose(1, 2))
        return m.head(y.mean(1))

    block = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    return Pattern(forward, a=conv(3, 12, stride=2), block=block, head=nn.Linear(12, 4))


class FusedAttention(nn.Module):
    """As timm writes it: one Linear for queries, keys and values; the numbers of heads kept beside it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, dim // heads, dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn(16, heads))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        bias = self.table[:length].t()[None, :, :, None]
        y = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias + bias.transpose(-2, -1))
        return self.proj(y.transpose(1, 2).reshape(n, length, self.attn_dim))


def fused_qkv() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).flatten(2).transpose(1, 2)
        return m.head((y + m.attn(y)).mean(1))

    return Pattern(forward, a=conv(3, 12, stride=2), attn=FusedAttention(12, 3), head=nn.Linear(12, 4))


def dict_of_outputs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> dict[str, Any]:
        y = m.a(x).relu()
        return {"first": m.one(pool(y)), "rest": [m.two(pool(y)), (m.three(pool(m.b(y).relu())),)]}

    return Pattern(
        forward,
        a=conv(3, 6),
        b=conv(6, 5),
        one=nn.Linear(6, 2),
        two=nn.Linear(6, 3),
        three=nn.Linear(5, 4),
    )


def group_norm() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.b(m.norm(m.a(x)).relu()).relu()))

    return Pattern(forward, a=conv(3, 8), norm=nn.GroupNorm(4, 8), b=conv(8, 5), head=nn.Linear(5, 4))


def group_norm_of_one() -> nn.Module:
    model = group_norm()
    model.norm = nn.GroupNorm(1, 8)
    return model


def group_norm_over_a_stream() -> nn.Module:
    """As diffusion networks have it: norms of groups of 3 and of 2, on channels that a sum ties."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x = x + m.c(m.second(m.b(m.first(x).relu())).relu())
        return m.head(pool(m.last(x).relu()))

    return Pattern(
        forward,
        a=conv(3, 12),
        first=nn.GroupNorm(4, 12),
        b=conv(12, 10),
        second=nn.GroupNorm(5, 10, affine=False),
        c=conv(10, 12),
        last=nn.GroupNorm(6, 12),
        head=nn.Linear(12, 4),
    )


def instance_norm_and_prelu() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.one(m.norm(m.a(x)))
        return m.head(pool(m.c(m.two(m.b(y)))))

    return Pattern(
        forward,
        a=conv(3, 8),
        norm=nn.InstanceNorm2d(8, affine=True),
        one=nn.PReLU(8),
        b=conv(8, 6),
        two=nn.PReLU(),
        c=conv(6, 5),
        head=nn.Linear(5, 4),
    )


# Network -> what of it can go, by the layers that write it
CASES: list[tuple[Callable[[], nn.Module], Groups]] = [
    (encoder, {"a": 12, "block.linear1": 16, "block.self_attn.q": 2}),
    (fused_qkv, {"a": 12, "attn.qkv": 3}),
    (dict_of_outputs, {"a": 6, "one": "output of the network", "b": 5}),
    (group_norm, {"a": 4, "b": 5}),
    (group_norm_of_one, {"a": "GroupNorm mixes", "b": 5}),
    (group_norm_over_a_stream, {"a": 2, "b": 5}),
    (instance_norm_and_prelu, {"a": 8, "b": 6, "c": 5}),
]
NAMES = [build.__name__ for build, _ in CASES]


@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("build", [build for build, _ in CASES], ids=NAMES)
def test_slim_equals_masked(build: Callable[[], nn.Module], mode: Any) -> None:
    assert_cut_exactly(built(build), mode)


@pytest.mark.parametrize(("build", "expected"), CASES, ids=NAMES)
def test_find_groups_says_what_can_go_and_why_the_rest_stays(
    build: Callable[[], nn.Module], expected: Groups
) -> None:
    assert_groups(built(build), expected)


def test_layers_that_only_training_calls_keep_what_they_read() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x).relu()
        z = m.head(pool(m.b(y).relu()))
        return (z, m.auxiliary(pool(y))) if m.training else z

    torch.manual_seed(0)
    layers = {"a": conv(3, 8), "b": conv(8, 6), "head": nn.Linear(6, 4), "auxiliary": nn.Linear(8, 4)}
    model = Pattern(forward, **layers).double().eval()
    converted = convert(model, EXAMPLE.double())
    groups = {group.name: group.whole_because for group in converted.scan.groups}
    assert "can't train" in (groups["a"] or "")
    assert groups["b"] is None
    switch_off_(converted.model)
    slimmed = slim(converted, 50.0).model
    assert slimmed.b.out_channels < 6
    assert [tuple(output.shape) for output in slimmed.train()(EXAMPLE.double())] == [(2, 4), (2, 4)]
