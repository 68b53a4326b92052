"""Layers that run elsewhere than where they stand, or are seen to run nowhere, are no branches."""

import torch
from torch import Tensor, nn

from vbdcompress.surgery.verify import find_groups


class Held(nn.Module):
    """Looks at values; `shared` holds the table of words for others and never runs, as of sequence models."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.words = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.words.weight = self.shared.weight
        self.norm, self.wide, self.head = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, length] -> [batch, 3]."""
        if bool((ids < 0).any()):
            raise ValueError("no such word")
        y: Tensor = self.head(torch.relu(self.wide(self.norm(self.words(ids)).mean(1))))
        return y


def test_a_layer_that_only_holds_another_s_weight_is_no_branch() -> None:
    scan = find_groups(Held(), torch.randint(0, 9, (2, 5)))
    assert [(group.name, group.size) for group in scan.removable] == [("wide", 12)]


class Untrainable(nn.Module):
    """Looks at values; in training it asks for targets, before its depthwise layer runs, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.more, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, h, w] -> [batch, 2, h - 2, w - 2]."""
        if self.training or bool((x > 1000).any()):
            raise ValueError("targets should not be None")
        y: Tensor = self.last(self.more(self.deep(self.wide(x)).relu()).relu())
        return y


def test_a_depthwise_layer_that_ran_is_no_branch() -> None:
    groups = find_groups(Untrainable().eval(), torch.randn(2, 3, 6, 6)).removable
    assert [(group.name, group.size) for group in groups] == [("wide", 8), ("more", 8)]
