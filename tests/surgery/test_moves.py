"""Channels that are moved about between layers: what goes must go exactly, what stays says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import EXAMPLE, Groups, Pattern, assert_cut_exactly, assert_groups, built, conv, pool
from torch import Tensor, nn

from vbdcompress.surgery.verify import find_groups


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


WIDTHS = {"g": (6, 5), "r": (5, 6), "k": (5, 7)}


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


def quarters() -> nn.Module:
    """Each quarter is added to what the one before gave: the last could go alone, the others only with it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        parts = m.a(x).relu().chunk(4, 1)
        found = [parts[0]]
        for layer, part in zip((m.b, m.c, m.d), parts[1:], strict=True):
            found.append(layer(part + found[-1]).relu())
        return m.head(pool(torch.cat(found, 1)))

    return Pattern(forward, a=conv(3, 16), b=conv(4, 4), c=conv(4, 4), d=conv(4, 4), head=nn.Linear(16, 4))


def called_in_vain() -> nn.Module:
    """A stream with a way out of each step, as WaveNet has it: nothing reads the last step's addition."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, out = m.a(x), torch.zeros(())
        for gate, back, away in ((m.g1, m.r1, m.k1), (m.g2, m.r2, m.k2)):
            z = gate(y).tanh()
            out = out + away(z)
            y = y + back(z)
        return m.head(pool(out.relu()))

    steps = {f"{name}{n}": conv(*sizes) for n in (1, 2) for name, sizes in WIDTHS.items()}
    return Pattern(forward, a=conv(3, 6), **steps, head=nn.Linear(7, 4))


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


# Network -> what of it can go, by the layers that write it
CASES: list[tuple[Callable[[], nn.Module], Groups]] = [
    (concat_with_itself, {"a": 6, "b": 5}),
    (used_before_its_layer, {"a": 6, "b": 4, "c": 3, "d": 5}),
    (concat_of_several, {"a": 6, "b": 4, "c": 5}),
    (halves, {"a": 4, "b": 6}),  # as many of either half
    (halves_of_two, {"a": "can't run without", "c": 5}),
    (quarters, {"a": 4, "d": 4}),
    (called_in_vain, {"a": 6, "g1": 5, "k1": 7, "g2": "'r2' reads it; no gradient reaches it"}),
    (last_channels, {"a": 6, "a (2)": "can't run without", "b": 5}),
    (view_before_linear, {"a": 6, "fc": 10}),
    (pixel_shuffle, {"a": 4, "b": 6}),  # four channels of `a` make one of its reader's
    (reshape_before_transposed, {"fc": "can't run without some of its channels", "up": 5}),
    (channel_shuffle, {"a": "can't run without", "b": "can't run without", "c": 6}),
    # what the shortcut carries goes, its zeros are as many as the code says
    (padded_shortcut, {"a": 4, "a (2)": "can't run without", "b": 6}),
    (unet, {"d1": 6, "d2": 8, "mid": 10, "up2": 8, "u2": 8, "up1": 6, "u1": 6}),
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
