"""Weights that parametrizations compute are stored, and the network goes the whole way."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import vbdcompress
from vbdcompress import compress, convert
from vbdcompress.parametrized import computes_weights, store_weights_


def vocoder() -> nn.Sequential:
    """1-d convolutions, all of them with weight norm, as vocoders have them."""
    torch.manual_seed(0)
    return nn.Sequential(
        weight_norm(nn.Conv1d(3, 8, 3)),
        nn.LeakyReLU(),
        spectral_norm(nn.Conv1d(8, 6, 3)),
        nn.LeakyReLU(),
        weight_norm(nn.Conv1d(6, 6, 3)),
        nn.Flatten(),
        orthogonal(nn.Linear(36, 16)),
        nn.ReLU(),
        weight_norm(nn.Linear(16, 3), dim=0),
    )


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1, times a gain, anew at each call: as NFNets and BiT have them."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, stride=2, padding=1, bias=bias)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def computed(self) -> Tensor:
        spread, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return self.gain * (self.weight - mean) / spread.sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(), self.bias, self.stride, self.padding)


class Doubled(nn.Linear):
    """Named arguments, and a bias that is computed, too."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, bias=2 * self.bias, weight=2 * self.weight)


def standardised() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = Standardised(1, 8), nn.ReLU(), Standardised(8, 6, bias=False), nn.ReLU()
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *convolutions, nn.Flatten(), Doubled(18, 3))


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


class Twice(Standardised):
    """What follows its product is its own, too."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Strided(Standardised):
    """Another stride than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(), self.bias, 1, self.padding)


class Usual(nn.Conv2d):
    """Code of its own that takes the weight as it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


INPUTS = torch.randn(60, 3, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(60) % 3


def test_computed_weights_of_a_layer_s_own_code_are_stored() -> None:
    model = standardised().train()
    copied, (first, _, second) = copy.deepcopy(model), model[1:4]
    store_weights_(copied)
    assert [type(copied[place]) for place in (1, 3, 6)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    for layer, stored in ((first, copied[1]), (second, copied[3])):
        assert torch.equal(stored.weight, layer.computed())
        assert [name for name, _ in stored.named_parameters()] == ["weight", "bias"][: 1 + (layer is first)]
        assert all(isinstance(parameter, nn.Parameter) for parameter in stored.parameters())
    assert copied.training
    torch.testing.assert_close(copied(INPUTS), model(INPUTS))
    assert [type(model[place]) for place in (1, 3, 6)] == [Standardised, Standardised, Doubled]


@pytest.mark.parametrize("kind", [Padded, Routed, Noisy, Twice, Strided, Usual])
def test_layers_that_do_more_than_one_product_of_fixed_weights_stay(kind: type[nn.Module]) -> None:
    assert not computes_weights(kind(3, 4))
    assert computes_weights(Standardised(3, 4))
    model = nn.Sequential(kind(3, 4))
    store_weights_(model)
    assert type(model[0]) is kind


def test_a_weight_that_others_hold_too_stays_computed() -> None:
    model = nn.Sequential(Standardised(4, 4), Standardised(4, 4), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    store_weights_(model)
    assert [type(layer) for layer in model] == [Standardised, nn.Conv2d, nn.Conv2d]


def test_a_layer_under_two_names_stays_one() -> None:
    layer = Standardised(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    store_weights_(model)
    assert model[0] is model[2]
    assert type(model[0]) is nn.Conv2d


def test_stored_weights_are_what_was_computed_and_a_copy_leaves_its_original_alone() -> None:
    model = vocoder().eval()
    copied = copy.deepcopy(model)
    expected = model(INPUTS)
    store_weights_(copied)
    assert not any(parametrize.is_parametrized(module) for module in copied.modules())
    assert type(copied[0]) is nn.Conv1d
    torch.testing.assert_close(copied(INPUTS), expected)
    torch.testing.assert_close(model(INPUTS), expected)
    assert all(parametrize.is_parametrized(model[place]) for place in (0, 2, 4, 6, 8))


@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_parametrized_layers_are_converted_and_those_to_skip_are_not(mode: Any) -> None:
    model = vocoder().eval()
    converted = convert(model, INPUTS[:2], mode, skip=["4"])
    torch.testing.assert_close(converted.model.eval()(INPUTS), model(INPUTS))
    assert converted.stored == ("0", "2", "6", "8")
    assert parametrize.is_parametrized(converted.model[4])
    rows = {row.name: row.action for row in converted.table}
    assert rows["2" if mode == "channels" else "0"] == "converted"


@pytest.mark.parametrize("mode", ["weights", "channels"])
@pytest.mark.parametrize("build", [vocoder, standardised])
def test_computed_weights_go_the_whole_way(
    build: Callable[[], nn.Sequential], mode: Any, tmp_path: Any
) -> None:
    model = build()
    batches = [(INPUTS[start : start + 20], LABELS[start : start + 20]) for start in (0, 20, 40)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no test set
        found = compress(
            model, batches, validation=batches, mode=mode, epochs=40, beta=30.0, finetune_epochs=1
        )
    assert any(map(computes_weights, model))
    size = found.report["size"]
    assert size["after"]["nonzeros"] < 0.9 * size["before"]["nonzeros"]
    layer = "0" if build is vocoder else "1"
    assert layer in [row["name"] for row in found.report["layers"]]
    assert not any("norm" in name for name in found.report["uncounted_ops"])  # no file computes it
    found.export(tmp_path)
    again = vbdcompress.load_slim(tmp_path / "slim.safetensors", build())

    def outputs(network: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = network.eval()(INPUTS)
        return result

    assert torch.equal(outputs(again), outputs(found.model))
