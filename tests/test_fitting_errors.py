"""fit: where it stops, and what it says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.checkpoints import FitCheckpoint
from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches
from vbdcompress.errors import DataError, FitError
from vbdcompress.files import load_tensors
from vbdcompress.fitting import fit

Make = Callable[[], nn.Module]
CONFIG = FitConfig(device="cpu", epochs=4)


class FailingLoss:
    """Cross entropy that goes wrong from one call on: its value, or only its gradient."""

    def __init__(self, at: int, what: str) -> None:
        self.calls, self.at, self.what = 0, at, what

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(output, target)
        if self.calls < self.at:
            return loss
        # the slope of sqrt at 0 is infinite, and infinity times 0 is NaN
        wrong = {"value": loss * torch.nan, "infinity": loss + torch.inf}  # the latter's gradient is finite
        return wrong.get(self.what, loss + (0 * output.sum()).square().sqrt())


WRONG = [("value", 7, 2), ("value", 6, 1), ("infinity", 6, 1), ("gradient", 6, 1)]


# Three steps an epoch: the seventh is the first of the third epoch, the sixth the last of the second.
@pytest.mark.parametrize(("what", "at", "done"), WRONG)
def test_fit_stops_where_the_loss_is_not_finite(
    small_batches: TensorBatches, make_network: Make, tmp_path: Path, what: str, at: int, done: int
) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", every_seconds=0)
    with pytest.raises(FitError, match=f"epoch {done + 1}: .* not finite") as caught:
        fit(make_network(), small_batches, CONFIG, loss=FailingLoss(at, what), checkpoint=checkpoint)
    assert f"checkpoint after epoch {done} is kept" in str(caught.value)
    content = load_tensors(checkpoint.path)
    assert len(content["rows"]) == done
    assert all(tensor.isfinite().all() for tensor in content["model"].values())


def test_fit_names_nan_in_the_data(small_batches: TensorBatches, make_network: Make) -> None:
    small_batches.inputs[3, 2] = torch.nan
    with pytest.raises(FitError, match=r"epoch 1: .* not finite \(NLL nan") as caught:
        fit(make_network(), small_batches, CONFIG)
    assert "checkpoint" not in str(caught.value)  # there is none
    assert "NaN in the data" in str(caught.value)


@pytest.mark.parametrize("label", [3, -1])
def test_fit_names_a_label_without_a_logit(make_network: Make, label: int) -> None:
    batch = (torch.randn(2, 5), torch.tensor([0, label]))
    with pytest.raises(FitError, match=rf"refused a batch: Target {label} is out of bounds(.|\n)*from 0"):
        fit(make_network(), [batch], CONFIG)


def test_fit_names_a_batch_that_norms_can_t_train_on() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    batches = [(torch.randn(size, 4), torch.zeros(size, dtype=torch.int64)) for size in (5, 1)]
    with pytest.raises(FitError, match=r"(?s)batch of one example.*drop_last=True"):
        fit(model, batches, FitConfig(device="cpu", epochs=1))


def test_fit_lets_the_networks_own_errors_through() -> None:
    with pytest.raises(IndexError, match="index out of range"):
        fit(nn.Embedding(3, 4), [(torch.tensor([7]), torch.tensor([0]))], CONFIG)


def test_fit_refuses_what_gives_its_batches_only_once(
    small_batches: TensorBatches, make_network: Make
) -> None:
    with pytest.raises(DataError, match="only once"):
        fit(make_network(), iter(list(small_batches)), CONFIG)
    with pytest.raises(DataError, match="only once"):
        fit(make_network(), iter(list(small_batches)), CONFIG, num_data=12)


def test_fit_refuses_a_network_without_parameters(small_batches: TensorBatches) -> None:
    with pytest.raises(FitError, match="no parameter"):
        fit(nn.ReLU(), small_batches, CONFIG)
    with pytest.raises(FitError, match="no parameter"):
        fit(nn.Linear(5, 3).requires_grad_(False), small_batches, CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"device": "cuda"},
            "'cuda' x 1 can't be used",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        pytest.param(
            {"device": "mps"},
            "'mps' x 1 can't be used",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device"),
        ),
    ],
)
def test_fit_refuses_a_device_that_is_not_there(
    small_batches: TensorBatches, make_network: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        fit(make_network(), small_batches, FitConfig(epochs=1, **options))


def test_fit_refuses_more_gpus_than_there_are(
    small_batches: TensorBatches, make_network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_fabric.accelerators.cuda._get_all_visible_cuda_devices", lambda: [0])
    monkeypatch.setattr("lightning_fabric.accelerators.cuda.num_cuda_devices", lambda: 1)
    with pytest.raises(FitError, match=r"'cuda' x 2 can't be used: .*\[0, 1\]"):
        fit(make_network(), small_batches, FitConfig(epochs=1, device="cuda", devices=2))
