"""Sizes that a program holds as numbers: what they were worked out from decides what can go."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from vbdcompress.conversion import convert
from vbdcompress.exported import from_exported


class Reshaped(nn.Module):
    """Layers with a function between them, which reshapes."""

    def __init__(self, between: Any, readers: int) -> None:
        super().__init__()
        self.a, self.between = nn.Conv2d(3, 8, 3, padding=1), between
        self.b, self.head = nn.Linear(readers, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.between(self.a(x).relu())).relu())


def by_channel(y: Tensor) -> Tensor:
    return y.view(y.shape[0], 8, 16).mean(2)


def flat(y: Tensor) -> Tensor:
    return y.reshape(y.shape[0], 8 * 16)


def heads(y: Tensor) -> Tensor:
    q = y.flatten(2).transpose(1, 2).reshape(-1, 16, 4, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(-1, 16, 8).mean(1)


def heads_of_what_is_left(y: Tensor) -> Tensor:
    q = y.flatten(2).transpose(1, 2).reshape(y.shape[0], 16, 4, -1).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(y.shape[0], 16, -1).mean(1)


def heads_beside_the_batch(y: Tensor) -> Tensor:
    n = y.shape[0]
    q = y.flatten(2).permute(2, 0, 1).reshape(16, n * 4, 2).transpose(0, 1)
    merged = (q @ q.transpose(1, 2)).softmax(-1) @ q
    return merged.transpose(0, 1).reshape(16 * n, 8).view(16, n, 8).mean(0)


def expanded(y: Tensor) -> Tensor:
    return y.mean((2, 3))[:, :, None].expand(y.shape[0], 8, 2).sum(2)


def unflattened(y: Tensor) -> Tensor:
    return y.mean((2, 3)).unflatten(1, (2, 4)).sum(1)


def windows(y: Tensor) -> Tensor:
    parts = y.permute(0, 2, 3, 1).reshape(y.shape[0], 2, 2, 2, 2, 8).transpose(2, 3)
    return parts.reshape(-1, 4, 8).amax(1).reshape(-1, 4, 8).mean(1)


# What of the 8 channels can go one by one
CASES = [
    (by_channel, 8, 8),
    (flat, 128, 8),
    (heads, 8, 4),
    (heads_of_what_is_left, 8, 4),
    (heads_beside_the_batch, 8, 4),
    (expanded, 8, 8),
    (unflattened, 4, 4),
    (windows, 8, 8),
]


@pytest.mark.parametrize(("between", "width", "size"), CASES, ids=[case[0].__name__ for case in CASES])
def test_free_sizes_lets_channels_go_through_reshapes(between: Any, width: int, size: int) -> None:
    torch.manual_seed(0)
    model, x = Reshaped(between, width).eval(), torch.randn(2, 3, 4, 4)
    found = from_exported(torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},)))
    with torch.no_grad():
        assert torch.equal(found(torch.cat([x] * 3)), model(torch.cat([x] * 3)))
    group = convert(found, x).scan.groups[0]
    assert (group.name, group.size, group.whole_because) == ("a", size, None)


class SplitHeads(nn.Module):
    """Queries, keys and values cut from one projection by their size, as nanoGPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = (part.view(batch, length, 4, 2).transpose(1, 2) for part in self.qkv(x).split(8, dim=2))
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(batch, length, 8)
        return self.head(self.out(mixed).relu().mean(1))


def test_heads_that_are_split_by_a_size_can_go() -> None:
    torch.manual_seed(0)
    program = torch.export.export(
        SplitHeads().eval(), (torch.randn(3, 5, 6),), dynamic_shapes=({0: Dim("batch", min=2)},)
    )
    converted = convert(from_exported(program), torch.randn(2, 5, 6), mode="channels")
    sizes = {group.readers[0].layer: group.size for group in converted.scan.removable}
    assert sizes["out"] == 4
