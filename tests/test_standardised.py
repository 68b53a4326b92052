"""Weights that layers' own code computes are stored where they are the raw ones scaled and shifted."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vbdcompress
from vbdcompress import compress, convert
from vbdcompress.parametrized import standardised_layers, store_weights_

INPUTS = torch.randn(60, 3, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(60) % 3


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1, times a gain, anew at each call: as NFNets and BiT have them."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, stride: int = 2) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def computed(self) -> Tensor:
        spread, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return self.gain * (self.weight - mean) / spread.sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(), self.bias, self.stride, self.padding)


class Doubled(nn.Linear):
    """Gives the product its arguments by name."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, bias=self.bias, weight=2 * self.weight)


def standardised() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = Standardised(1, 8), nn.ReLU(), Standardised(8, 6, bias=False), nn.ReLU()
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *convolutions, nn.Flatten(), Doubled(18, 3))


def empty() -> nn.Sequential:
    """As `torch.nn.utils.skip_init` leaves it."""
    model = standardised()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


class Padded(Standardised):
    """Pads by its own rule."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.computed(), self.bias, self.stride, 1)


class Routed(Standardised):
    """Weights that hang on what is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed() * x.mean(), self.bias, self.stride, self.padding)


class Noisy(Standardised):
    """Other weights in training than in eval mode."""

    def computed(self) -> Tensor:
        return super().computed() * (2 if self.training else 1)


class Seeded(Standardised):
    """Draws by a generator of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.drawn = torch.Generator().manual_seed(1)

    def computed(self) -> Tensor:
        return super().computed() * torch.rand(1, generator=self.drawn)


class Twice(Standardised):
    """What follows its product is its own, too."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Strided(Standardised):
    """Another stride than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(), self.bias, 1, self.padding)


class Tuple(Standardised):
    """Gives two things."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), 0


class Masked(Standardised):
    """Sees some of its inputs only, as autoregressive networks do."""

    def computed(self) -> Tensor:
        mask = torch.ones_like(self.weight)
        mask[:, :, 2] = 0
        return self.weight * mask


class Positive(Standardised):
    """Weights that are never below 0."""

    def computed(self) -> Tensor:
        return F.softplus(self.weight)


class Rounded(Standardised):
    """Weights of 8 bits, as training for them has it."""

    def computed(self) -> Tensor:
        scale = self.weight.abs().max() / 127
        return self.weight + ((self.weight / scale).round() * scale - self.weight).detach()


class Usual(Standardised):
    """The weight as it is."""

    def computed(self) -> Tensor:
        return self.weight


def test_computed_weights_are_stored_in_place() -> None:
    model = standardised().train()
    copied, (first, _, second) = copy.deepcopy(model), model[1:4]
    kept = [copied[1], copied[3]]
    assert list(standardised_layers(copied)) == ["1", "3", "6"]
    store_weights_(copied, ["1", "3", "6"])
    assert [type(copied[place]) for place in (1, 3, 6)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert [copied[1], copied[3]] == kept
    for layer, stored, names in ((first, copied[1], ["weight", "bias"]), (second, copied[3], ["weight"])):
        assert torch.equal(stored.weight, layer.computed())
        assert [name for name, _ in stored.named_parameters()] == names
    assert copied.training
    torch.testing.assert_close(copied(INPUTS), model(INPUTS))
    assert [type(model[place]) for place in (1, 3, 6)] == [Standardised, Standardised, Doubled]


@pytest.mark.parametrize(
    "kind",
    [
        *(Padded, Routed, Noisy, Seeded, Twice, Strided, Tuple),
        *(Masked, Positive, Rounded, Usual),
    ],
)
def test_layers_that_do_anything_else_stay(kind: Callable[..., nn.Module]) -> None:
    assert not list(standardised_layers(nn.Sequential(kind(3, 4))))


def test_layers_stay_whose_weight_is_another_s_too_or_frozen_or_of_two_inputs() -> None:
    tied = nn.Sequential(Standardised(4, 4), Standardised(4, 4), nn.Conv2d(4, 4, 3))
    tied[2].weight = tied[0].weight
    assert list(standardised_layers(tied)) == ["1"]
    tied[1].weight.requires_grad = False
    assert not list(standardised_layers(tied))
    assert not list(standardised_layers(nn.Sequential(Doubled(2, 4))))
    frozen = nn.Sequential(Standardised(4, 4)).requires_grad_(False)
    store_weights_(frozen, ["0"])
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


class Network(nn.Module):
    """A layer used as `use` does, in front of others."""

    def __init__(self, layer: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.layer, self.use = nn.Conv2d(1, 6, 3, padding=1), layer, use
        self.last, self.head = nn.Conv2d(4, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.use(self, self.stem(x[:, None]).relu())
        logits: Tensor = self.head(self.last(y.relu()).mean((2, 3)))
        return logits


class Scalable(Standardised):
    """Takes a second argument."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.conv2d(x, self.computed() * scale, self.bias, self.stride, self.padding)


USES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "another argument": (lambda: Scalable(6, 4), lambda n, x: n.layer(x, 2.0)),
    "its own parameter": (lambda: Standardised(6, 4), lambda n, x: n.layer(x) * n.layer.gain[:, 0]),
    "its raw weight": (lambda: Standardised(6, 4), lambda n, x: n.layer(x) + n.layer.weight.mean()),
    "its type": (lambda: Standardised(6, 4), lambda n, x: n.layer(x) * (type(n.layer) is Standardised)),
}


@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("use", USES)
def test_layers_that_the_network_uses_otherwise_stay(use: str, mode: Any) -> None:
    layer, how = USES[use]
    torch.manual_seed(0)
    model = Network(layer(), how).eval()
    converted = convert(model, INPUTS, mode)
    assert converted.stored == ()
    torch.testing.assert_close(converted.undo()(INPUTS), model(INPUTS))


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_a_layer_under_two_names_stays_one(mode: Any) -> None:
    torch.manual_seed(0)
    model = Network(Standardised(6, 6, stride=1), lambda n, x: n.again[0](n.layer(x).relu())[:, :4]).eval()
    model.again = [model.layer]  # not among its modules
    converted = convert(model, INPUTS, mode)
    assert converted.stored == ("layer",)
    assert converted.model.again[0] is converted.model.layer
    assert "its computed weights are stored" in {row.name: row.reason for row in converted.table}["layer"]
    torch.testing.assert_close(converted.undo()(INPUTS), model(INPUTS))


@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_standardised_weights_go_the_whole_way(mode: Any, tmp_path: Any) -> None:
    model = standardised()
    batches = [(INPUTS[start : start + 20], LABELS[start : start + 20]) for start in (0, 20, 40)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no test set
        found = compress(
            model, batches, validation=batches, mode=mode, epochs=40, beta=30.0, finetune_epochs=1
        )
    assert type(model[1]) is Standardised
    size = found.report["size"]
    assert size["after"]["nonzeros"] < 0.9 * size["before"]["nonzeros"]
    assert "1" in [row["name"] for row in found.report["layers"]]
    found.export(tmp_path)
    with torch.no_grad():
        expected = found.model.eval()(INPUTS)
        for build in (standardised, empty):
            again = vbdcompress.load_slim(tmp_path / "slim.safetensors", build())
            assert torch.equal(again.eval()(INPUTS), expected)
