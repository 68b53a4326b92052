"""Numbers of channels that networks keep beside their layers follow what is left, where nothing else does."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from small_networks import EXAMPLE, assert_cut_exactly, assert_groups, built, conv, pool, switch_off_
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.slimming import slim
from vbdcompress.surgery.slice import apply_plan_
from vbdcompress.surgery.verify import find_groups


class Halves(nn.Module):
    """One half goes past a layer, the other through it; the width of a half is kept in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.inner, self.last = 12, conv(12, 12), conv(24, 5)
        self.wide = nn.Sequential(conv(3, 24), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        past, through = self.wide(x).split((self.width, self.width), 1)
        y: Tensor = self.last(torch.cat([past, through + self.inner(through)], 1))
        return y


class Scales(nn.Module):
    """As Res2Net: each part but the last is convolved, and added to the next before that."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.wide, self.last = conv(3, 24, 1), conv(24, 5, 1)
        self.scales = nn.ModuleList(conv(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.wide(x).relu(), self.width, 1)
        found = [self.scales[0](parts[0]).relu()]
        for part, scale in zip(parts[1:3], self.scales[1:], strict=True):
            found.append(scale(found[-1] + part).relu())
        y: Tensor = self.last(torch.cat([*found, parts[3]], 1))
        return y


class Reshaped(nn.Module):
    """Sizes of views are kept as numbers; others that are as large say something else."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.classes, self.flat, self.steps = 10, 10, 8 * 64, 8 * 64
        self.wide, self.narrow, self.last = conv(3, 10), nn.Conv1d(10, 8, 1), nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.wide(x).view(len(x), self.dim, -1)).relu()
        z: Tensor = self.last(y.view(-1, self.flat))
        return z


class Called(nn.Module):
    """As `Scales`, but it keeps that number under another name, or has it written in its code."""

    def __init__(self, *, written: bool) -> None:
        super().__init__()
        self.step = None if written else 6
        self.wide, self.last = conv(3, 24, 1), conv(24, 5, 1)
        self.scales = nn.ModuleList(conv(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.wide(x).relu(), self.step or 6, 1)
        found = [self.scales[0](parts[0]).relu()]
        for part, scale in zip(parts[1:3], self.scales[1:], strict=True):
            found.append(scale(found[-1] + part).relu())
        y: Tensor = self.last(torch.cat([*found, parts[3]], 1))
        return y


class Blocks(nn.Module):
    """Blocks whose layers are called alike, side by side."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(pool(torch.stack([block(x) for block in self.blocks]).sum(0)))
        return y


class Gained(nn.Conv2d):
    """A gain of its own for each output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


def gained() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.ReLU(), Gained(12, 9), nn.ReLU(), conv(9, 5))


class Network(nn.Module):
    """A block whose numbers are one step above its layers, and a head."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.block, self.head = block(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        z: Tensor = self.head(pool(y) if y.dim() == 4 else y)
        return z


NETWORKS = {
    Halves: {"block.wide.0": 12, "block.last": 5},
    Scales: {"block.wide": 6, "block.scales.2": 6, "block.last": 5},
    gained: {"block.2": 9, "block.4": 5},
    Reshaped: {"block.wide": 10, "block.narrow": 8, "block.last": 5},
}


@pytest.mark.parametrize("block", NETWORKS)
def test_groups_with_numbers_go_exactly(block: Callable[[], nn.Module]) -> None:
    model = built(lambda: Network(block))
    assert_groups(model, NETWORKS[block])
    assert_cut_exactly(model, "channels")


@pytest.mark.parametrize("block", NETWORKS)
def test_a_fresh_network_is_cut_to_the_plan(block: Callable[[], nn.Module]) -> None:
    converted = convert(built(lambda: Network(block)), EXAMPLE.double())
    switch_off_(converted.model)
    slimmed = slim(converted, 50.0)
    fresh = built(lambda: Network(block))
    apply_plan_(fresh, slimmed.plan)
    fresh.load_state_dict(slimmed.model.state_dict())
    assert torch.equal(fresh(EXAMPLE.double()), slimmed.model(EXAMPLE.double()))


KINDS = [Scales, partial(Called, written=False), partial(Called, written=True)]


@cache
def alone(kind: int) -> list[tuple[int, bool]]:
    """What can go of a block that is the only one."""
    return groups_by_block(built(lambda: Blocks(KINDS[kind]())), 1)[0]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_block_that_the_first_of_its_kind_does_not_help_goes_its_own_way(first: int) -> None:
    kinds = [*range(first, 3), *range(first), first]
    model = built(lambda: Blocks(*(KINDS[kind]() for kind in kinds)))
    assert groups_by_block(model, len(kinds)) == [alone(kind) for kind in kinds]
    assert_cut_exactly(model, "channels")


class Viewed(nn.Module):
    """Looks at its channels by a number, or by one that is written in its code."""

    def __init__(self, *, written: bool) -> None:
        super().__init__()
        self.wide, self.last = conv(3, 8), nn.Linear(8, 5)
        self.width, self.written = 8, written

    def forward(self, x: Tensor) -> Tensor:
        y = pool(self.wide(x).relu())
        z: Tensor = self.last(y.view(-1, 8) if self.written else y.view(-1, self.width))
        return z[..., None, None]


def test_a_first_block_that_nothing_helps_does_not_keep_the_others_whole() -> None:
    model = built(lambda: Blocks(*(Viewed(written=written) for written in (True, False, False, True, False))))
    goes = [groups[0][1] for groups in groups_by_block(model, 5)]
    assert goes == [False, True, True, False, True]


def groups_by_block(model: nn.Module, count: int) -> list[list[tuple[int, bool]]]:
    """(size, whether it can go) of the groups of each block's first layer."""
    groups = find_groups(model, EXAMPLE.double()).groups
    return [
        [(g.size, g.whole_because is None) for g in groups if g.name.startswith(f"blocks.{number}.wide")]
        for number in range(count)
    ]


def test_a_number_that_only_happens_to_be_as_large_stays() -> None:
    converted = convert(built(lambda: Network(Reshaped)), EXAMPLE.double())
    switch_off_(converted.model)
    block = slim(converted, 50.0).model.block
    assert (block.dim, block.flat) == (block.wide.out_channels, block.last.in_features)
    assert block.dim < 10
    assert (block.classes, block.steps) == (10, 8 * 64)
