"""Slimming is exact: the converted network, masked in eval mode, against the cut one, in float64.

The oracle is the converted network itself: its gates stand at the readers' inputs and its masks on
the weights, and no code of the cut takes part in computing its output.
"""

from functools import partial

import pytest
import torch
import torchvision
from small_networks import small_densenet, small_vgg
from torch import nn

from vbdcompress.architectures import build_architecture
from vbdcompress.conversion import convert
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

THRESHOLD = 3.0


FAMILIES = {
    "lenet_300_100": (lambda: build_architecture("lenet_300_100"), (1, 28, 28)),
    "lenet5": (lambda: build_architecture("lenet5"), (1, 28, 28)),
    "digits": (lambda: build_architecture("digits"), (1, 8, 8)),
    "vgg": (small_vgg, (3, 32, 32)),
    "resnet18": (torchvision.models.resnet18, (3, 32, 32)),
    "densenet": (small_densenet, (3, 32, 32)),
    "mobilenet_v2": (partial(torchvision.models.mobilenet_v2, width_mult=0.25), (3, 32, 32)),
}


def build_random(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network in float64 with random weights, biases and batch-norm statistics, and a batch."""
    build, shape = FAMILIES[name]
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_()
    return model, torch.randn(3, *shape, dtype=torch.float64)


@torch.no_grad()
def switch_off_(model: nn.Module, share: float) -> None:
    """Random theta, and a share of all posteriors above the threshold; of weights also whole outputs."""
    for posterior in find_posteriors(model):
        off = torch.rand(posterior.theta.shape) < share
        if posterior.kind == "gate":
            posterior.theta.uniform_(0.5, 1.5)
        else:
            off |= (torch.rand(len(off)) < share).view(-1, *[1] * (off.dim() - 1))
        posterior.log_sigma2.fill_(-30.0)
        posterior.log_sigma2[off] = 30.0


@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("name", FAMILIES)
def test_slim_equals_masked(name: str, mode: str) -> None:
    model, batch = build_random(name)
    converted = convert(model, batch, mode)
    whole = [group.name for group in converted.scan.groups if group.whole_because]
    assert len(whole) == 1  # the output's channels alone
    switch_off_(converted.model, 0.3)
    set_threshold_(converted.model, THRESHOLD)
    converted.model.eval()
    slimmed = slim(converted, THRESHOLD)
    with torch.no_grad():
        expected, found = converted.model(batch), slimmed.model(batch)
        dense = model(batch)
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()  # something was masked
    assert (expected - found).abs().max() <= 1e-10 * expected.abs().max()
    before = sum(parameter.numel() for parameter in model.parameters())
    after = sum(parameter.numel() for parameter in slimmed.model.parameters())
    assert after < before if mode == "weights" else after < 0.75 * before


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5", "digits"])
@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_slim_equals_masked_when_inputs_go(name: str, mode: str) -> None:
    model, batch = build_random(name)
    converted = convert(model, batch, mode, prune_inputs=True)
    switch_off_(converted.model, 0.3)
    if mode == "weights":  # whole columns too, or no input would be unread
        first = next(p for p in find_posteriors(converted.model) if p.theta.dim() == 2)
        first.log_sigma2.data[:, ::3] = 30.0
    set_threshold_(converted.model, THRESHOLD)
    converted.model.eval()
    slimmed = slim(converted, THRESHOLD)
    gathers = [row for row in slimmed.groups if "(inputs)" in row.name]
    assert gathers
    assert all(row.kept < row.size for row in gathers)
    with torch.no_grad():
        expected, found = converted.model(batch), slimmed.model(batch)
    assert (expected - found).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5"])
def test_inputs_can_go_twice(name: str) -> None:
    model, batch = build_random(name)
    sizes = []
    for _ in range(2):
        converted = convert(model, batch, "channels", prune_inputs=True)
        switch_off_(converted.model, 0.3)
        converted.model.train()(batch)
        set_threshold_(converted.model, THRESHOLD)
        model = slim(converted, THRESHOLD).model
        with torch.no_grad():
            expected, found = converted.model.eval()(batch), model(batch)
        assert (expected - found).abs().max() <= 1e-10 * expected.abs().max()
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("mode", ["channels", pytest.param("weights", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_undo_restores_the_exact_original(name: str, mode: str) -> None:
    model, batch = build_random(name)
    model.float()
    batch = batch.float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    converted = convert(model, batch, mode)
    restored = converted.undo()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(restored.state_dict()) == list(before)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(model(batch), restored(batch))


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_slim_keeps_the_last_channel_of_every_layer(mode: str) -> None:
    model, batch = build_random("lenet5")
    converted = convert(model, batch, mode, prune_inputs=True)
    switch_off_(converted.model, 1.0)
    slimmed = slim(converted, THRESHOLD)
    assert all(row.kept >= 1 for row in slimmed.groups)
    assert all(parameter.numel() for parameter in slimmed.model.parameters())
    with torch.no_grad():
        set_threshold_(converted.model, THRESHOLD)
        expected = converted.model.eval()(batch)
        assert torch.allclose(slimmed.model(batch), expected, rtol=1e-10, atol=1e-12)
