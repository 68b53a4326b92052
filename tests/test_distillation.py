"""Distillation: the loss against a sum by hand, and a fit that follows its teacher, not its labels."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress import distillation
from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches
from vbdcompress.distillation import DistillationLoss, outputs_of
from vbdcompress.evaluation import cross_entropy
from vbdcompress.fitting import fit

Make = Callable[[], nn.Module]


def by_hand(output: Tensor, taught: Tensor, temperature: float) -> float:
    """KL(teacher || network) of softened outputs, one class of one example at a time, mean over examples."""
    total = 0.0
    for mine, told in zip(output.tolist(), taught.tolist(), strict=True):
        p, q = ([math.exp(value / temperature) for value in row] for row in (told, mine))
        for a, b in zip(p, q, strict=True):
            total += a / sum(p) * math.log((a / sum(p)) / (b / sum(q)))
    return total / len(output)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_loss_is_the_sum_by_hand(temperature: float, share: float) -> None:
    output, taught = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1])
    found = DistillationLoss(cross_entropy, share, temperature)(output, (labels, taught))
    expected = share * by_hand(output, taught, temperature)
    expected += (1 - share) * F.cross_entropy(output, labels).item()
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_loss_takes_a_class_for_each_position() -> None:
    output, taught = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    loss = DistillationLoss(cross_entropy, 1.0, 2.0)
    flat = [tensor.movedim(1, -1).reshape(-1, 3) for tensor in (output, taught)]
    torch.testing.assert_close(loss(output, (None, taught)), loss(flat[0], (None, flat[1])))


def test_outputs_of_are_the_teachers(make_network: Make) -> None:
    inputs = torch.randn(2500, 5)  # more than are shown at once
    teacher = make_network()
    torch.testing.assert_close(outputs_of(teacher, inputs), teacher(inputs).detach())


def misled(teacher: nn.Module) -> TensorBatches:
    """A set whose labels are wrong: the class that the teacher holds for the least likely."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(200, 5, generator=generator)
    return TensorBatches(inputs, teacher(inputs).argmin(1), 50, shuffle=True)


def agreement(model: nn.Module, teacher: nn.Module, inputs: Tensor) -> float:
    return float((model(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean())


def make_teacher() -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def test_fit_follows_the_teacher_and_not_the_labels(make_network: Make) -> None:
    teacher = make_teacher()
    batches = misled(teacher)
    config = FitConfig(epochs=60, lr=1e-2, device="cpu")
    before = copy.deepcopy(teacher.state_dict())
    followed = fit(make_network(), batches, config, teacher=teacher).model
    alone = fit(make_network(), batches, config).model
    assert agreement(followed, teacher, batches.inputs) > 0.9
    assert agreement(alone, teacher, batches.inputs) < 0.2
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_fit_without_a_share_follows_the_labels_alone(make_network: Make) -> None:
    teacher = make_teacher()
    batches = misled(teacher)
    told = fit(make_network(), batches, FitConfig(epochs=2, device="cpu", distill=0), teacher=teacher)
    alone = fit(make_network(), batches, FitConfig(epochs=2, device="cpu"))
    assert [row.nll for row in told.epochs] == [row.nll for row in alone.epochs]


def test_a_teacher_asked_once_says_what_one_asked_at_every_step_says(make_network: Make) -> None:
    teacher = make_teacher()
    inputs, labels = torch.randn(40, 5), torch.arange(40) % 3
    config = FitConfig(epochs=3, device="cpu", distill=0.7)
    in_memory = TensorBatches(inputs, labels, 10)
    listed = [(inputs[start : start + 10], labels[start : start + 10]) for start in range(0, 40, 10)]
    results = [
        [row.nll for row in fit(make_network(), batches, config, teacher=teacher).epochs]
        for batches in (in_memory, listed)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_an_augmented_image_is_shown_to_the_teacher_as_it_is() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(60, 1, 8, 8, generator=generator)
    seen: list[Tensor] = []

    class Teacher(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input)
            return input.flatten(1)[:, :3]

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, input: Tensor) -> Tensor:
            return input.flatten(1)[:, :3] * self.scale

    batches = TensorBatches(inputs, torch.arange(60) % 3, 20, shuffle=True, augment="crop-flip")
    rows = fit(Student(), batches, FitConfig(epochs=2, lr=1e-12, device="cpu"), teacher=Teacher()).epochs
    # the same pixels on both sides: no divergence, whatever the crop
    assert [row.nll for row in rows] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert len(seen) == 6
    assert not torch.equal(seen[0], seen[3])


def test_a_teacher_is_asked_for_each_shift_where_these_are_fewer_than_the_epochs() -> None:
    asked: list[int] = []

    class Teacher(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            asked.append(len(input))
            return input.flatten(1)[:, :3]

    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images = TensorBatches(torch.rand(20, 1, 4, 4), torch.arange(20) % 3, 10, augment="crop", pixels=1)
    for epochs, calls in ((9, [20] * 9), (8, [10] * 16)):
        asked.clear()
        fit(student, images, FitConfig(epochs=epochs, device="cpu"), teacher=Teacher())
        assert asked == calls


class Weighted(nn.Module):
    """A loss with a network of its own, a norm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 1.0]), requires_grad=False)
        self.norm = nn.BatchNorm1d(3).eval()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.norm(output), target, self.weight)


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_a_loss_that_is_a_module_goes_along_and_stays_as_it_was(make_network: Make, distill: float) -> None:
    loss = Weighted()
    inputs, labels = torch.randn(40, 5), torch.arange(40) % 3
    config = FitConfig(epochs=2, device="cpu", precision="64-true", distill=distill)
    fitted = fit(make_network(), [(inputs, labels)], config, loss=loss, teacher=make_teacher())
    assert all(math.isfinite(row.nll) for row in fitted.epochs)
    assert loss.weight.dtype == torch.float32
    assert not loss.norm.training
    assert torch.equal(loss.norm.running_mean, torch.zeros(3))


def test_a_teacher_whose_outputs_outweigh_the_inputs_is_asked_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    calls: list[int] = []

    class Teacher(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            calls.append(len(input))
            return super().forward(input)

    batches = TensorBatches(torch.randn(40, 2), torch.arange(40) % 3, 10)
    teacher, config = Teacher(2, 3), FitConfig(epochs=3, device="cpu", schedule="constant")
    losses = []
    for limit in (1 << 20, 0):  # 480 bytes of outputs, 320 of inputs
        monkeypatch.setattr(distillation, "KEPT_BYTES", limit)
        torch.manual_seed(1)
        losses.append([row.nll for row in fit(nn.Linear(2, 3), batches, config, teacher=teacher).epochs])
    assert calls == [40] + [40] + [10] * 12  # once for all; then to see how many, and at every step
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
