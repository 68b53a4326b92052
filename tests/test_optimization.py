"""What the optimizer does to each kind of parameter, against torch's own optimizers and by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vbdcompress import convert
from vbdcompress.config import FitConfig
from vbdcompress.optimization import make_optimizer, parameter_groups
from vbdcompress.vbd.posterior import find_posteriors


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def _steps(model, optimizer, inputs, target):
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (FitConfig(lr=0.01), lambda parameters: torch.optim.Adam(parameters, lr=0.01)),
        (
            FitConfig(lr=0.01, optimizer="sgd"),
            lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
        ),
    ],
)
def test_make_optimizer_steps_as_torch_s_own(config, reference):
    inputs, target = torch.randn(16, 4), torch.randint(0, 3, (16,))
    # eval: a bias before batch norm has a gradient of rounding alone, which Adam makes a whole step of
    ours, theirs = _network().eval(), _network().eval()
    found = _steps(ours, make_optimizer(ours, config), inputs, target)
    expected = _steps(theirs, reference(theirs.parameters()), inputs, target)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("optimizer", "factor"), [("adam", 1 - 0.1 * 0.5), ("sgd", 1 - 0.1 * 0.5 * 1.9)])
def test_weight_decay_shrinks_matrices_alone(optimizer, factor):
    """With no gradient a step is theta * (1 - rate * decay); Nesterov's first step has 1 + 0.9 of it."""
    model = _network()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = make_optimizer(model, FitConfig(lr=0.1, weight_decay=0.5, optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (factor if parameter.dim() == 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_weight_decay_spares_what_has_a_posterior(mode):
    model = convert(_network(), torch.zeros(2, 4), mode=mode).model
    groups = parameter_groups(model, FitConfig(weight_decay=0.5))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    with_posterior = {id(t) for p in find_posteriors(model) for t in (p.theta, p.log_sigma2)}
    assert not decayed & with_posterior
    plain = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in with_posterior]
    assert decayed == {id(parameter) for parameter in plain}
    assert bool(plain) == (mode == "channels")


def test_make_optimizer_takes_complex_weights():
    model = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.cfloat)), nn.Parameter(torch.ones(3))])
    optimizer = make_optimizer(model, FitConfig(lr=0.1))
    sum(parameter.abs().sum() for parameter in model).backward()
    optimizer.step()
    for parameter in model:  # Adam's first step is the rate
        torch.testing.assert_close(parameter.detach().real, torch.full((3,), 0.9))
