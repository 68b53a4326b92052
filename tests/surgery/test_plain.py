"""Networks under gradient checkpointing are followed as if they were called plainly."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from vbdcompress.conversion import convert


class Checkpointed(nn.Module):
    """A part of it is computed again on the way back, to save memory."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.reentrant = reentrant

    def part(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(checkpoint(self.part, x, use_reentrant=self.reentrant))
        return output


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_channels_are_followed_through_what_is_computed_again(reentrant: bool) -> None:
    before = dict(vars(checkpointing))
    converted = convert(Checkpointed(reentrant), torch.randn(4, 6))
    assert [(group.name, group.size) for group in converted.scan.removable] == [("a", 8), ("b", 7)]
    assert {name: vars(checkpointing)[name] for name in before} == before
    trained = converted.model.train()
    trained(torch.randn(4, 6)).sum().backward()  # as torch does it
    assert all(each.grad is not None for each in trained.head.parameters())
