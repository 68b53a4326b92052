"""A network is worked on in copies: one whose copies would still run on the original's layers is refused."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.errors import ConvertError
from vbdcompress.pipeline import compress


class Functional(nn.Module):
    """Two layers with something between them that a function computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(8, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 3)
        self.between: Callable[[Tensor], Tensor] = torch.relu

    def scaled(self, x: Tensor) -> Tensor:
        return self.scale * x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class CallsALayer(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6)
        self.between = lambda x: self.hidden(x).relu()


class CallsDropout(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()
        self.between = lambda x: self.drop(x).relu()


class ReadsAWeight(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6)
        self.between = lambda x: F.linear(x, self.hidden.weight)


class ReadsAView(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6)
        weight = self.hidden.weight.T.detach()
        self.between = lambda x: x @ weight


class Singleton(nn.Linear):
    """The same object in each copy."""

    def __deepcopy__(self, memo: object) -> "Singleton":
        return self


class Shares(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.between = Singleton(6, 6)


class Listed(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.steps = [lambda x, layer=layer: layer(x) for layer in self.layers]
        self.between = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return self.last(x)


def patched() -> nn.Module:
    model = Functional()
    forward = model.forward
    model.forward = lambda x: forward(2 * x)  # type: ignore[method-assign]
    return model


REFUSED = [
    (CallsALayer, "'hidden'"),
    (CallsDropout, "'drop'"),
    (ReadsAWeight, "'hidden'"),
    (ReadsAView, "'hidden'"),
    (Shares, "'between'"),
    (Listed, "'layers.0', 'layers.1'"),
    (patched, "'first', 'last'"),
]


@pytest.mark.parametrize(("build", "named"), REFUSED)
def test_a_network_whose_copy_runs_on_its_layers_is_refused(build: Callable[[], nn.Module], named: str):
    model = build().train()
    with pytest.raises(ConvertError, match=rf"layers of the original.*: {named}\.\n.*make them methods"):
        convert(model, torch.rand(2, 8), "weights")
    batches = [(torch.rand(6, 8), torch.arange(6) % 3)]
    with pytest.raises(ConvertError, match=rf"layers of the original.*: {named}\."):
        compress(model, batches, validation=batches, mode="weights")
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_that_is_refused_keeps_its_statistics():
    class Normalised(Functional):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.between = lambda x: self.norm(x).relu()

    model = Normalised().train()
    with pytest.raises(ConvertError, match="layers of the original"):
        convert(model, torch.rand(4, 8), "weights")
    assert not model.norm.running_mean.any()
    assert model.norm.training


class Mapped(Functional):
    """Over single examples, by torch.func, with a matrix that is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.eye(8).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.func.jacrev(lambda z: z.sin().sum())(x)
        mixed = torch.sparse.mm(self.mixing, (x + slopes).T).T
        return torch.vmap(lambda row: self.last(torch.relu(self.first(row))))(mixed)


def test_tensors_without_a_storage_of_their_own_are_no_hindrance():
    model, x = Mapped(), torch.rand(5, 8)
    torch.testing.assert_close(convert(model, x[:2], "weights").undo()(x), model(x))


def test_functions_that_a_copy_takes_along_are_no_hindrance():
    """A method that is bound to the network, one in a partial, a closure over nothing or a type of it."""
    factor = 2.0
    bound, partial, free, typed = Functional(), Functional(), Functional(), Functional()
    typed.between = lambda x: x.to(typed.first.weight.dtype)
    bound.between = bound.scaled
    partial.between = functools.partial(F.linear, weight=nn.Parameter(torch.eye(6)))
    free.between = lambda x: factor * x
    for model in (bound, partial, free, typed):
        converted = convert(model, torch.rand(2, 8), "weights")
        x = torch.rand(5, 8)
        expected = model(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        torch.testing.assert_close(converted.undo()(x), expected)


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_a_network_that_draws_in_eval_mode_is_refused(mode: Any):
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 9), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.b(F.dropout(self.a(x).relu()))
            return output

    with pytest.raises(ConvertError, match=r"with what is drawn\.\nNoise and dropout are for training"):
        convert(Drops(), torch.rand(2, 8), mode)
