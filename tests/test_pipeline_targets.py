"""Targets: what the loss and the metric take, and what is refused before the fit."""

import threading

import pytest
import torch
from torch import nn

from vbdcompress.data import TensorBatches
from vbdcompress.errors import ConfigError, ConvertError, DataError
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
        (torch.arange(32), 5, {}, "training loader: has labels up to 7, the network has 5 outputs"),
        (
            torch.randn(32, 10),
            10,
            {"metric": lambda *_: torch.zeros(8)},
            r"(?s)are no probabilities.*loss=F\.mse_loss",
        ),
        (torch.rand(32, 10), 10, {"metric": lambda *_: torch.zeros(8)}, "do not sum to 1"),
        (
            torch.rand(32),
            1,
            {"loss": nn.functional.l1_loss},
            r"validation loader: yields targets of float32 \[8\]; top1_error: classes are whole numbers",
        ),
        (
            torch.eye(10)[torch.arange(32) % 10],
            10,
            {},
            r"validation loader: yields targets of float32 \[8, 10\]; top1_error",
        ),
    ],
)
def test_targets_that_the_loss_or_metric_can_t_take_are_refused_at_once(targets, outputs, named, message):
    model, batches = batches_of(targets, outputs)
    with pytest.raises(DataError, match=message):
        compress(model, batches, validation=batches, epochs=1, finetune_epochs=0, **named)


@pytest.mark.parametrize(
    ("part", "targets", "message"),
    [
        (
            "training",
            torch.arange(32, dtype=torch.int32) % 10,
            r"training loader: yields targets of int32 \[8\]",
        ),
        ("training", [0, 1, 2, 3, 4, 5, 6, 7], "training loader: yields targets of lists of 8"),
        ("test", torch.eye(10)[torch.arange(32) % 10], r"test loader: yields targets of float32 \[8, 10\]"),
        ("validation", torch.full((8,), -100), "validation loader.*from 0 to 9, found are -100 to -100"),
        ("test", torch.arange(8) + 3, "test loader.*classes are from 0 to 9, found are 3 to 10"),
    ],
)
def test_targets_of_every_part_are_tried_before_the_fit(part, targets, message):
    classes = torch.arange(32) % 10
    model, good = batches_of(classes)
    bad = [(images, targets[:8]) for images, _ in good]
    loaders = {"training": good, "validation": good, "test": good} | {part: bad}
    with pytest.raises(DataError, match=message):
        compress(
            model,
            loaders["training"],
            validation=loaders["validation"],
            test=loaders["test"],
            distill=0.0,
            epochs=1,
        )


def test_a_class_for_each_pixel_is_a_target_for_a_loss_of_one_s_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    batches = [(torch.rand(8, 1, 8, 8), torch.randint(0, 4, (8, 8, 8))) for _ in range(3)]
    found = compress(
        model,
        batches,
        validation=batches,
        test=batches,
        loss=nn.functional.cross_entropy,
        epochs=1,
        finetune_epochs=0,
    )
    assert 0 < found.report["error"] < 100


def test_probabilities_are_targets_for_cross_entropy():
    classes = torch.arange(64) % 10
    model, batches = batches_of(torch.eye(10)[classes] * 0.9 + 0.01)
    validation = batches_of(classes)[1]
    with pytest.warns(UserWarning, match="no test set"):
        found = compress(model, batches, validation=validation, epochs=1, finetune_epochs=0)
    assert len(found.report["stages"]) == 1


@pytest.mark.parametrize(
    ("last", "outputs", "named", "message"),
    [
        ([nn.Softmax(1)], 10, {}, "gives probabilities .* cross entropy needs logits"),
        (
            [nn.Softmax(1)],
            10,
            {"distill": 0.5, "loss": nn.functional.nll_loss},
            "gives probabilities .* dist",
        ),
        ([], 1, {}, "gives one number for an example, cross entropy needs"),
        (
            [],
            1,
            {"distill": 0.5, "loss": nn.functional.mse_loss, "metric": nn.functional.l1_loss},
            "gives one number for an example, distillation needs",
        ),
    ],
)
def test_outputs_that_are_no_logits_are_refused_at_once(last, outputs, named, message):
    model, batches = batches_of(torch.zeros(32, dtype=torch.int64), outputs)
    with pytest.raises(DataError, match=message):
        compress(nn.Sequential(model, *last), batches, validation=batches, epochs=1, **named)


def test_log_probabilities_are_logits():
    model, batches = batches_of(torch.arange(64) % 10)
    model = nn.Sequential(model, nn.LogSoftmax(1))
    found = compress(model, batches, validation=batches, test=batches, epochs=1, finetune_epochs=0)
    assert len(found.report["stages"]) == 1


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda output, target: (output.argmax(1) != target).float().mean(), r"an error for each example"),
        (lambda output, target: torch.nan * (output.argmax(1) >= 0), "gives NaN for an example"),
        (lambda output, target: 3.0 * (output.argmax(1) >= 0), "errors from 3 to 3, allowed are 0 to 1"),
    ],
)
def test_metrics_are_tried_before_the_fit(metric, message):
    model, batches = batches_of(torch.arange(64) % 10)
    with pytest.raises(DataError, match=message):
        compress(model, batches, validation=batches, metric=metric, epochs=1)


def test_a_metric_may_be_out_by_its_rounding():
    model, batches = batches_of(torch.arange(64) % 10)

    def metric(output, _):
        return output[:, 0] * 0 - 1e-7

    found = compress(model, batches, validation=batches, test=batches, metric=metric, epochs=1)
    assert found.report["error"] == pytest.approx(0, abs=1e-4)


def test_a_label_below_0_is_refused():
    model, batches = batches_of(torch.arange(64) % 10 - 1)
    with pytest.raises(DataError, match="labels from -1, allowed are 0 to 9"):
        compress(model, batches, validation=batches, epochs=1)


def test_labels_that_cross_entropy_passes_over_are_taken_in_training():
    labels = torch.arange(64) % 10
    model, clean = batches_of(labels)
    _, some = batches_of(torch.where(torch.arange(64) % 7 == 0, -100, labels))
    compress(model, some, validation=clean, test=clean, epochs=1, finetune_epochs=0)
    whole = TensorBatches(torch.cat([images for images, _ in some]), torch.cat([each for _, each in some]), 8)
    with pytest.raises(DataError, match=r"validation loader: has labels from -100"):
        compress(model, clean, validation=whole, epochs=1)


class Remembers(nn.Linear):
    """Keeps what it computed."""

    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


class DropsAlways(nn.Linear):
    """Drops in eval mode too."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x))


class HoldsALock(nn.Linear):
    """With an object that Python does not copy."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()


class HasExtraState(nn.Linear):
    """With more than tensors in its state_dict."""

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Remembers, r"can't be copied: it holds computed tensors: 4.seen"),
        (DropsAlways, "in eval mode, outputs for the same inputs differ by .* from call to call"),
        (HoldsALock, "can't be copied: cannot pickle '_thread.lock' object"),
        (HasExtraState, "state_dict entry '4._extra_state' is a dict"),
        (lambda *sizes: nn.utils.weight_norm(nn.Linear(*sizes)), "holds computed tensors: 4.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_networks_that_no_file_could_hold_are_refused_at_once(layer, message):
    model, batches = batches_of(torch.arange(64) % 10, 6)
    model.append(layer(6, 10))
    model(batches[0][0])
    with pytest.raises(ConvertError, match=message):
        compress(model, batches, validation=batches, epochs=1)


class KeepsALoss(nn.Linear):
    """Keeps a loss on the way, in training alone."""

    def forward(self, x):
        found = super().forward(x)
        if self.training:
            self.kept = [found.abs().mean()]
        return found


def test_a_network_may_keep_losses_of_its_training_steps():
    model, batches = batches_of(torch.arange(64) % 10, 6)
    model.append(KeepsALoss(6, 10))
    options = {"epochs": 2, "finetune_epochs": 1}
    found = compress(model, batches, validation=batches, test=batches, **options)
    assert len(found.report["finetune"]) == 1


def test_sparse_embeddings_are_fitted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Flatten(), nn.Linear(32, 10))
    batches = [(torch.randint(0, 30, (8, 4)), torch.arange(8)) for _ in range(3)]
    found = compress(model, batches, validation=batches, test=batches, mode="weights", epochs=1)
    assert found.report["stages"][0]["table"][0]["action"] == "converted"
    assert model[0].sparse


def test_resume_without_a_folder_is_refused():
    model, batches = batches_of(torch.arange(64) % 10)
    with pytest.raises(ConfigError, match="resume=True names no folder"):
        compress(model, batches, validation=batches, resume=True)


class TwoHeads(nn.Module):
    """With an auxiliary head in training."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, images):
        hidden = self.body(images.flatten(1)).relu()
        return (self.head(hidden), self.aux(hidden)) if self.training else self.head(hidden)


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_auxiliary_heads_are_named(distill):
    batches = batches_of(torch.arange(64) % 10)[1]
    with pytest.raises(DataError, match="gives a tuple in training mode"):
        compress(
            TwoHeads(), batches, validation=batches, test=batches, mode="weights", epochs=1, distill=distill
        )
