"""fit: a checkpoint whose weights lay otherwise in memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vbdcompress.checkpoints import FitCheckpoint
from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches
from vbdcompress.fitting import fit
from vbdcompress.records import EpochRow


class Convolutions(nn.Module):
    """Code that says `view` takes images in one order in memory, code that says `flatten` in any."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 4)
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.last(x.view(x.size(0), -1) if self.views else x.flatten(1))


class StopAfterTwo:
    def on_start(self, title: str, epochs: int) -> None:
        """Takes no notice."""

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """Takes no notice."""

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        if row.epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("views", [True, False])
def test_moments_are_those_of_their_weights_where_these_lie_otherwise_on_resume(tmp_path: Path, views: bool):
    """The unbroken fit is the oracle; what was fitted in one order goes on in the other."""
    inputs = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = TensorBatches(inputs, torch.arange(60) % 4, 20, shuffle=True)
    config = FitConfig(device="cpu", epochs=5, lr=0.01)
    whole = Convolutions(views=views)
    expected = fit(whole, batches, config).epochs
    path = tmp_path / "fit.ckpt"
    checkpoint = FitCheckpoint(path, every_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        fit(Convolutions(views=views), batches, config, checkpoint=checkpoint, listener=StopAfterTwo())
    other = Convolutions(views=not views)
    found = fit(other, batches, config, checkpoint=FitCheckpoint(path, resume=True)).epochs
    assert [row.nll for row in found] == pytest.approx([row.nll for row in expected], rel=1e-5)
    torch.testing.assert_close(other.second.weight, whole.second.weight, rtol=1e-3, atol=1e-4)
