"""Hard patterns, each in a small network of its own: what goes must go exactly, what stays says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.slimming import slim
from vbdcompress.surgery.verify import EXACT, find_groups, flatten_output, relative_difference
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class Pattern(nn.Module):
    """A forward function over named layers."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.of = forward

    def forward(self, x: Tensor) -> Any:
        return self.of(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def concat_with_itself() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.head(pool(m.b(torch.cat([y, y.tanh(), y], 1)).relu()))

    return Pattern(forward, a=conv(3, 6), b=conv(18, 5), head=nn.Linear(5, 4))


def used_before_its_layer() -> nn.Module:
    """An operation that keeps its input for its derivative, before a layer reads the same input."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        curved, pooled = F.gelu(y) * y.sigmoid(), F.max_pool2d(y, 3, 1, 1)
        z = m.b(y).relu()
        return m.head(pool(torch.cat([z, m.c(curved).relu(), m.d(pooled).relu()], 1)))

    return Pattern(forward, a=conv(3, 6), b=conv(6, 4), c=conv(6, 3), d=conv(6, 5), head=nn.Linear(12, 4))


def concat_of_several() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = m.a(x).relu(), m.b(x).relu()
        return m.head(pool(m.c(torch.cat([y, x, z, y], 1)).relu()))

    return Pattern(forward, a=conv(3, 6), b=conv(3, 4), c=conv(19, 5), head=nn.Linear(5, 4))


def scale_of_two() -> nn.Module:
    """One parameter with an entry for each channel of two groups."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.a(x), m.b(x)], 1).relu() * m.scale
        return m.head(pool(m.c(y).relu()))

    model = Pattern(forward, a=conv(3, 7), b=conv(3, 5), c=conv(12, 6), head=nn.Linear(6, 4))
    model.scale = nn.Parameter(torch.rand(1, 12, 1, 1))
    return model


def halves() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).relu().chunk(2, 1)
        return m.head(pool(m.b(left).relu() + m.c(right).tanh()))

    return Pattern(forward, a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), head=nn.Linear(6, 4))


def halves_of_two() -> nn.Module:
    """Two groups that are right one by one, and not together unless each loses as many."""

    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = torch.cat([m.a(x), m.b(x)], 1).relu().chunk(2, 1)
        return m.head(pool(m.c(left).relu() + m.d(right).relu()))

    return Pattern(forward, a=conv(3, 6), b=conv(3, 6), c=conv(6, 5), d=conv(6, 5), head=nn.Linear(5, 4))


def last_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.head(pool(m.b(torch.cat([y, y[:, -2:]], 1)).relu()))

    return Pattern(forward, a=conv(3, 8), b=conv(10, 5), head=nn.Linear(5, 4))


def view_before_linear() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(m.a(x).relu(), 4)
        return m.head(m.fc(y.view(y.size(0), -1)).relu())

    return Pattern(forward, a=conv(3, 6), fc=nn.Linear(24, 10), head=nn.Linear(10, 4))


def pixel_shuffle() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.b(F.pixel_shuffle(m.a(x).relu(), 2)).relu()))

    return Pattern(forward, a=conv(3, 16), b=conv(4, 6), head=nn.Linear(6, 4))


def reshape_before_transposed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(pool(m.a(x).relu())).relu()
        return m.out(m.up(y.reshape(y.shape[0], 6, 2, 2)).relu())

    return Pattern(
        forward, a=conv(3, 6), fc=nn.Linear(6, 24), up=nn.ConvTranspose2d(6, 5, 2, stride=2), out=conv(5, 2)
    )


def grouped() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.c(m.b(m.a(x).relu()).relu()).relu()))

    return Pattern(forward, a=conv(3, 8), b=conv(8, 12, groups=4), c=conv(12, 6), head=nn.Linear(6, 4))


def shares_of_groups() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.b(m.a(x).relu())).relu()
        return m.head(pool(m.up(y).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        b=conv(8, 6, groups=2),
        norm=nn.BatchNorm2d(6),
        up=nn.ConvTranspose2d(6, 10, 2, stride=2, groups=2),
        head=nn.Linear(10, 4),
    )


def grouped_transposed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.c(m.up(m.a(x).relu()).relu()).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        up=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4),
        c=conv(12, 5),
        head=nn.Linear(5, 4),
    )


def depthwise() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.c(m.norm(m.b(m.a(x).relu())).relu()).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        b=conv(8, 8, groups=8),
        norm=nn.BatchNorm2d(8),
        c=conv(8, 6, 1),
        head=nn.Linear(6, 4),
    )


def squeeze_excite() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x).relu()).relu()
        scale = m.up(m.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return m.head(pool(m.c(y * scale).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        b=conv(8, 8, groups=8),
        down=conv(8, 4, 1),
        up=conv(4, 8, 1),
        c=conv(8, 6),
        head=nn.Linear(6, 4),
    )


def squeeze_excite_grouped() -> nn.Module:
    model = squeeze_excite()
    model.b = conv(8, 8, groups=2)
    return model


def channel_shuffle() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        left, right = y.chunk(2, 1)
        y = torch.cat([left, m.b(right).relu()], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.head(pool(m.c(y).relu()))

    return Pattern(forward, a=conv(3, 8), b=conv(4, 4), c=conv(8, 6), head=nn.Linear(6, 4))


def padded_shortcut() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        short = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        y = (m.c(m.b(y).relu()) + short).relu()
        return m.head(pool(y))

    return Pattern(forward, a=conv(3, 4), b=conv(4, 6, stride=2), c=conv(6, 8), head=nn.Linear(8, 4))


def used_twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.b(m.a(x).relu()).relu()).relu()
        return m.head(pool(m.c(y).relu()))

    return Pattern(forward, a=conv(3, 6), b=conv(6, 6), c=conv(6, 5), head=nn.Linear(5, 4))


def bare_parameter() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.b(m.a(x).relu() * m.scale).relu()))

    model = Pattern(forward, a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4))
    model.scale = nn.Parameter(torch.rand(1, 6, 1, 1))
    return model


def bare_matrix() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.einsum("nchw,dc->ndhw", m.a(x).relu(), m.matrix)
        return m.head(pool(m.b(y).relu()))

    model = Pattern(forward, a=conv(3, 6), b=conv(7, 5), head=nn.Linear(5, 4))
    model.matrix = nn.Parameter(torch.rand(7, 6))
    return model


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


def recurrent() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu().flatten(2).transpose(1, 2)
        return m.head(m.fc(m.gru(m.lstm(y)[0])[0][:, -1]).relu())

    return Pattern(
        forward,
        a=conv(3, 6),
        lstm=nn.LSTM(6, 7, batch_first=True),
        gru=nn.GRU(7, 5, batch_first=True),
        fc=nn.Linear(5, 6),
        head=nn.Linear(6, 4),
    )


def unet() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        one = m.d1(x).relu()
        two = m.d2(F.max_pool2d(one, 2)).relu()
        three = m.mid(F.max_pool2d(two, 2)).relu()
        up = m.u2(torch.cat([m.up2(three), two], 1)).relu()
        up = m.u1(torch.cat([m.up1(up), one], 1)).relu()
        return m.out(up)

    return Pattern(
        forward,
        d1=conv(3, 6),
        d2=conv(6, 8),
        mid=conv(8, 10),
        up2=nn.ConvTranspose2d(10, 8, 2, stride=2),
        u2=conv(16, 8),
        up1=nn.ConvTranspose2d(8, 6, 2, stride=2),
        u1=conv(12, 6),
        out=conv(6, 2, 1),
    )


PATTERNS = {
    build.__name__: build
    for build in (
        concat_with_itself,
        used_before_its_layer,
        concat_of_several,
        scale_of_two,
        halves,
        halves_of_two,
        last_channels,
        view_before_linear,
        pixel_shuffle,
        reshape_before_transposed,
        grouped,
        shares_of_groups,
        grouped_transposed,
        depthwise,
        squeeze_excite,
        squeeze_excite_grouped,
        channel_shuffle,
        padded_shortcut,
        used_twice,
        bare_parameter,
        bare_matrix,
        encoder,
        fused_qkv,
        dict_of_outputs,
        group_norm,
        instance_norm_and_prelu,
        recurrent,
        unet,
    )
}
EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def built(name: str) -> nn.Module:
    torch.manual_seed(1)
    return PATTERNS[name]().double().eval()


def switch_off_(model: nn.Module) -> int:
    """Raise the variance of 30 % of each posterior beyond any threshold; how many went."""
    gone = 0
    for posterior in find_posteriors(model):
        log_sigma2 = posterior.log_sigma2.detach().flatten()
        chosen = torch.randperm(len(log_sigma2))[: max(1, round(0.3 * len(log_sigma2)))]
        log_sigma2[chosen] = 60.0
        gone += len(chosen)
    return gone


@torch.no_grad()
@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("name", PATTERNS)
def test_slim_equals_masked(name: str, mode: Any) -> None:
    converted = convert(built(name), EXAMPLE.double(), mode)
    assert switch_off_(converted.model) > 0
    slimmed = slim(converted, 50.0).model
    set_threshold_(converted.model, 50.0)
    other = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = flatten_output(converted.model.eval()(other))
    found = flatten_output(slimmed(other))
    assert relative_difference(expected, found) <= EXACT
    before = sum(parameter.numel() for parameter in converted.undo().parameters())
    if mode == "channels":
        assert sum(parameter.numel() for parameter in slimmed.parameters()) < before


# Group of the layer -> its number of channels that can go one by one, or why it stays whole
EXPECTED: dict[str, dict[str, int | str]] = {
    "concat_with_itself": {"a": 6, "b": 5},
    "used_before_its_layer": {"a": 6, "b": 4, "c": 3, "d": 5},
    "concat_of_several": {"a": 6, "b": 4, "c": 5},
    "scale_of_two": {"a": 7, "b": 5, "c": 6},
    "halves_of_two": {"a": "can't run without", "c": 5},
    "last_channels": {"a": 6, "a (2)": "can't run without", "b": 5},
    "view_before_linear": {"a": 6, "fc": 10},
    "pixel_shuffle": {"a": 4, "b": 6},  # four channels of `a` make one of its reader's
    "reshape_before_transposed": {"fc": "can't run without some of its channels", "up": 5},
    "grouped": {"a": 4, "c": 6},  # whole groups of `b` go
    "shares_of_groups": {"a": 4, "b": 3, "up": 5},  # each of 2 groups loses as many
    "grouped_transposed": {"a": 4, "c": 5},
    "depthwise": {"a": 8, "c": 6},
    "squeeze_excite": {"a": 8, "down": 4, "c": 6},
    "squeeze_excite_grouped": {"a": 4, "b": 4, "down": 4},
    "channel_shuffle": {"a": "can't run without", "b": "can't run without", "c": 6},
    # what the shortcut carries goes, its zeros are as many as the code says
    "padded_shortcut": {"a": 4, "a (2)": "can't run without", "b": 6},
    "halves": {"a": 4, "b": 6},  # as many of either half
    "used_twice": {"a": 6, "c": 5},
    "bare_parameter": {"a": 6, "b": 5},
    "bare_matrix": {"a": "mixes its channels", "b": 5},
    "encoder": {"a": "LayerNorm mixes", "block.linear1": 16, "block.self_attn.q": 2},
    "fused_qkv": {"a": 12, "attn.qkv": 3},
    "dict_of_outputs": {"a": 6, "one": "output of the network", "b": 5},
    "group_norm": {"a": "GroupNorm mixes", "b": 5},
    "instance_norm_and_prelu": {"a": 8, "b": 6, "c": 5},
    "recurrent": {"a": "LSTM mixes", "fc": 6},
    "unet": {"d1": 6, "d2": 8, "mid": 10, "up2": 8, "u2": 8, "up1": 6, "u1": 6},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_find_groups_says_what_can_go_and_why_the_rest_stays(name: str) -> None:
    converted = convert(built(name), EXAMPLE.double())
    groups = {group.name: group for group in converted.scan.groups}
    for layer, told in EXPECTED[name].items():
        if isinstance(told, int):
            assert (groups[layer].size, groups[layer].whole_because) == (told, None)
        else:
            assert told in (groups[layer].whole_because or "")


def test_find_groups_never_takes_one_half_alone_whatever_the_trial_masks() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).relu().chunk(2, 1)
        return m.head(pool(m.b(left).relu() + m.c(right).relu()))

    for seed in range(6):  # a random mask may happen to take as many of either half
        torch.manual_seed(seed)
        model = Pattern(forward, a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), head=nn.Linear(6, 4)).double()
        groups = {
            group.name: group for group in find_groups(model.eval(), EXAMPLE.double(), seed=seed).groups
        }
        assert groups["a"].whole_because is None
        assert groups["a"].writers[0].index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
        assert groups["b"].whole_because is None


def test_find_groups_never_takes_channels_that_go_in_twos_only() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu().unflatten(1, (2, -1)).tanh().flatten(1, 2)
        return m.head(pool(m.b(y).relu()))

    for seed in range(6):  # all trials may happen to mask even numbers of channels
        torch.manual_seed(seed)
        model = Pattern(forward, a=conv(3, 8), b=conv(8, 6), head=nn.Linear(6, 4)).double().eval()
        groups = {group.name: group for group in find_groups(model, EXAMPLE.double(), seed=seed).groups}
        assert "can't run without" in (groups["a"].whole_because or "")
        assert groups["b"].whole_because is None


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
