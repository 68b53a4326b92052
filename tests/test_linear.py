"""Modules that compute what nn.Linear does are opened as such, whatever they are called; others are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.linear import OpenLinear, open_linear
from vbdcompress.opening import open_layers_
from vbdcompress.slimming import slim
from vbdcompress.surgery.slice import apply_plan_


class Own(nn.Module):
    """A matrix, perhaps a bias, and a function of the input and them."""

    def __init__(self, of: Callable[..., Tensor], shape: tuple[int, int], bias: int | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape))
        self.shift = None if bias is None else nn.Parameter(torch.randn(bias))
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


def flat(own: Any, x: Tensor) -> Tensor:
    return torch.addmm(own.shift, x.reshape(-1, x.shape[-1]), own.matrix).view(*x.shape[:-1], -1)


LINEAR = {
    "addmm": lambda: Own(flat, (4, 6), 6),
    "matmul": lambda: Own(lambda own, x: x @ own.matrix, (4, 6)),
    "of torch": lambda: Own(lambda own, x: F.linear(x, own.matrix, own.shift), (6, 4), 6),
    "einsum": lambda: Own(lambda own, x: torch.einsum("...i,oi->...o", x, own.matrix), (6, 4)),
    "square": lambda: Own(lambda own, x: x @ own.matrix + own.shift, (4, 4), 4),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_is_opened(name: str) -> None:
    own = LINEAR[name]().double()
    if name == "square":
        nn.init.eye_(own.matrix)  # its own transpose: which way round it is, its weights don't say
    own.matrix.requires_grad_(False)
    opened = open_linear(own.eval())
    assert isinstance(opened, OpenLinear)
    assert (opened.weight.requires_grad, opened.training) == (False, False)
    if name == "square":
        with torch.no_grad():
            own.matrix.copy_(torch.randn(4, 4))
            opened.weight.copy_(own.matrix.t())
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    assert torch.allclose(opened(x), own(x), atol=1e-12)


def noisy(own: Any, x: Tensor) -> Tensor:
    return F.linear(F.dropout(x, 0.5, own.training), own.matrix)


OTHERS = {
    "scaled": lambda: Own(lambda own, x: 2 * x @ own.matrix, (4, 6)),
    "normed": lambda: Own(lambda own, x: F.linear(x, F.normalize(own.matrix)), (6, 4)),
    "noisy in training": lambda: Own(noisy, (6, 4)),
    "a table": lambda: Own(lambda own, x: own.matrix[x.long()], (6, 4)),
    "not its bias": lambda: Own(lambda own, x: F.linear(x, own.matrix), (6, 4), 6),
    "a distance": lambda: Own(lambda own, x: torch.cdist(x, own.matrix), (6, 4)),
    "of torch": lambda: nn.Linear(4, 6),
    "holds another": lambda: nn.Sequential(nn.Linear(4, 6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_stays(name: str) -> None:
    assert open_linear(OTHERS[name]()) is None


def test_a_hooked_one_stays() -> None:
    model = nn.Sequential(LINEAR["addmm"]())
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    open_layers_(model)
    assert isinstance(model[0], Own)


class Tied(nn.Module):
    """A table of words, and a head of the network's own that reads it."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.wide, self.narrow = nn.Linear(4, 12), nn.Linear(12, 4)
        of = (lambda own, x: x @ own.matrix) if transposed else (lambda own, x: F.linear(x, own.matrix))
        self.head = Own(of, (4, 9) if transposed else (9, 4))
        if transposed:
            self.other = Own(of, (4, 9))
            self.other.matrix = self.head.matrix
        else:
            self.head.matrix = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.narrow(torch.relu(self.wide(self.words(ids))))
        return self.head(x) + self.other(2 * x) if hasattr(self, "other") else self.head(x)


@pytest.mark.parametrize("transposed", [False, True])
def test_tied_ones_stay_tied(transposed: bool) -> None:
    model = Tied(transposed)
    converted = convert(model.eval(), torch.randint(0, 9, (2, 5)))
    other = converted.model.other.matrix if transposed else converted.model.words.weight
    head = converted.model.head
    assert (head.matrix if transposed else head.weight) is other
    assert "wide" in [group.name for group in converted.scan.removable]


def test_looking_leaves_the_generator_as_it_was() -> None:
    state = torch.get_rng_state()
    assert open_linear(OTHERS["noisy in training"]()) is None
    made = torch.get_rng_state()
    torch.set_rng_state(state)
    OTHERS["noisy in training"]()
    assert torch.equal(torch.get_rng_state(), made)


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_a_network_of_them_is_cut_and_a_fresh_one_to_its_plan(mode: Any) -> None:
    def built() -> nn.Module:
        return nn.Sequential(Own(flat, (5, 12), 12), nn.ReLU(), Own(flat, (12, 3), 3)).double().eval()

    converted = convert(built(), torch.randn(4, 5, dtype=torch.float64), mode)
    first = "converted" if mode == "weights" else "left"  # what reads the input has no gates
    assert [row.action for row in converted.table] == [first, "converted"]
    undone = converted.undo()
    assert [type(layer) for layer in undone] == [OpenLinear, nn.ReLU, OpenLinear]
    with torch.no_grad():
        for parameter in converted.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    slimmed = slim(converted, -4.0)
    fresh = built()
    apply_plan_(fresh, slimmed.plan)
    fresh.load_state_dict(slimmed.model.state_dict())
    x = torch.randn(6, 5, dtype=torch.float64)
    assert torch.equal(fresh(x), slimmed.model(x))
    if mode == "channels":
        assert slimmed.model[0].out_features < 12
