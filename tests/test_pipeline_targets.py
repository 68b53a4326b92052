"""Targets: what the loss and the metric take, and what is refused before the fit."""

import pytest
import torch
from torch import nn

from vbdcompress.errors import DataError
from vbdcompress.pipeline import compress


def batches_of(targets, outputs=10):
    """A network and batches of random images with these targets."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, outputs))
    images = torch.rand(len(targets), 1, 8, 8)
    return model, [(images[i : i + 8], targets[i : i + 8]) for i in range(0, len(targets), 8)]


@pytest.mark.parametrize(
    ("targets", "outputs", "named", "message"),
    [
        (torch.rand(32, 1), 10, {}, r"float32 \[8, 1\], cross entropy needs classes \[batch\]"),
        (torch.arange(32), 5, {}, "labels up to 7, the network has 5 outputs"),
        (torch.rand(32), 1, {"loss": nn.functional.l1_loss}, r"validation: yields targets of float32 \[8\]"),
        (torch.eye(10)[torch.arange(32) % 10], 10, {}, r"validation: yields targets of float32 \[8, 10\]"),
    ],
)
def test_targets_that_the_loss_or_metric_can_t_take_are_refused_at_once(targets, outputs, named, message):
    model, batches = batches_of(targets, outputs)
    with pytest.raises(DataError, match=message):
        compress(model, batches, validation=batches, epochs=1, finetune_epochs=0, **named)


def test_probabilities_are_targets_for_cross_entropy():
    classes = torch.arange(64) % 10
    model, batches = batches_of(torch.eye(10)[classes] * 0.9 + 0.01)
    validation = batches_of(classes)[1]
    with pytest.warns(UserWarning, match="no test set"):
        found = compress(model, batches, validation=validation, epochs=1, finetune_epochs=0)
    assert len(found.report["stages"]) == 1
