"""Rounded weights: as near as their bits allow, zeros kept, finer where the posterior asks for it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.precision import round_model_
from vbdcompress.rounding import Weight, choose_bits, error_over_sigma, round_weight, roundable
from vbdcompress.slimming import posterior_sigma, slim
from vbdcompress.vbd.posterior import find_posteriors


def sparse_layer(outputs: int = 30, inputs: int = 400) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    layer.weight.data *= 3 * torch.rand(outputs, 1) * (torch.rand(outputs, inputs) < 0.2)
    return layer


def own(layer: nn.Module) -> Weight:
    return roundable(layer)["weight"]


def weight_of(layer: nn.Module) -> np.ndarray:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().numpy()


def test_int8_is_within_half_a_step_of_each_outputs_own_scale() -> None:
    layer = sparse_layer()
    rounded = round_weight(own(layer), 8)
    assert rounded.kind == "int8"
    step = np.abs(weight_of(layer)).max(1, keepdims=True) / 127
    # half precision holds the scale to 2^-11 of itself
    assert (np.abs(rounded.decode() - weight_of(layer)) <= step * (0.5 + 127 * 2.0**-11)).all()


def test_a_transposed_convolution_has_a_scale_for_each_output_too() -> None:
    layer = nn.ConvTranspose2d(6, 5, 3)
    layer.weight.data *= torch.logspace(-3, 3, 5).view(1, 5, 1, 1)
    rounded = round_weight(own(layer), 8)
    assert rounded.scale is not None
    assert rounded.scale.shape == (5,)
    weight = weight_of(layer)
    largest = np.abs(weight).max((0, 2, 3), keepdims=True)
    assert (np.abs(rounded.decode() - weight) <= 0.005 * largest).all()


@pytest.mark.parametrize(("layer", "bits"), [(sparse_layer(), 4), (sparse_layer(600, 40), 8)])
def test_a_codebook_gives_each_weight_its_nearest_value(layer: nn.Linear, bits: int) -> None:
    rounded = round_weight(own(layer), bits)
    assert rounded.kind == "codebook"
    assert rounded.table is not None
    assert len(rounded.table) <= 2**bits
    assert rounded.table[0] == 0
    weight, kept = weight_of(layer), weight_of(layer) != 0
    distances = np.abs(weight[kept][:, None] - rounded.table[None, 1:])
    np.testing.assert_allclose(np.abs(rounded.decode() - weight)[kept], distances.min(1), atol=1e-7)
    assert not rounded.decode()[~kept].any()


def test_a_codebook_is_finest_where_the_posterior_is_narrow() -> None:
    layer = sparse_layer()
    sigma = np.where(weight_of(layer) > 0, 1e-3, 1.0).astype(np.float32)
    blind, seeing = round_weight(own(layer), 4), round_weight(own(layer), 4, sigma)
    assert error_over_sigma(own(layer), seeing, sigma) < 0.7 * error_over_sigma(own(layer), blind, sigma)


@pytest.mark.parametrize(("sigma", "bits"), [(1.0, 4), (0.001, 8), (1e-6, 16)])
def test_choose_bits_takes_the_fewest_that_the_posterior_allows(sigma: float, bits: int) -> None:
    layer = sparse_layer()
    chosen = choose_bits(own(layer), np.full_like(weight_of(layer), sigma))
    assert chosen.bits == bits


def test_posterior_sigma_stands_beside_the_weight_that_it_belongs_to() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    converted = convert(model, torch.randn(2, 8), "weights")
    for posterior in find_posteriors(converted.model):
        # a variance that the weight itself tells, but for those that go
        posterior.log_sigma2.data = 2 * posterior.theta.detach().abs().clamp_min(1e-20).log() - 4.0
        posterior.log_sigma2.data[torch.rand_like(posterior.theta) < 0.7] = 30.0
        posterior.log_sigma2.data[:3] = 30.0
    slimmed = slim(converted, 3.0)
    sigma = posterior_sigma(converted, slimmed)
    assert slimmed.model[2].weight.shape != (12, 16)
    for name, parameter in slimmed.model.named_parameters():
        if name.endswith("weight"):
            kept = parameter != 0
            assert kept.any()
            expected = np.exp(-2.0) * parameter.detach()[kept].abs().double()
            torch.testing.assert_close(sigma[name][kept], expected, rtol=1e-5, atol=1e-9)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))


def far_from(model: nn.Module, points: float) -> object:
    """An error that grows with the distance from the weights that a network had."""
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def measure(candidate: nn.Module) -> float:
        moved = sum(
            float((a - b).detach().abs().sum()) for a, b in zip(candidate.parameters(), start, strict=True)
        )
        return points * moved

    return measure


def test_auto_gives_more_bits_until_the_validation_error_is_allowed() -> None:
    wide = {"0.weight": torch.full((30, 20), 1.0), "2.weight": torch.full((5, 30), 0.5)}
    free = two_layers()
    rounding = round_model_(free, "auto", wide, far_from(free, 0.0))  # type: ignore[arg-type]
    assert [row.bits for row in rounding.rows] == [4, 4]
    tight = two_layers()
    measure = far_from(tight, 1.0)
    rounding = round_model_(tight, "auto", wide, measure)  # type: ignore[arg-type]
    assert rounding.error_after == measure(tight) <= 0.1  # type: ignore[operator]
    assert max(row.bits for row in rounding.rows) > 4
    asked = two_layers()
    rounding = round_model_(asked, "auto", wide, far_from(asked, 1.0), allowed_error=100.0)  # type: ignore[arg-type]
    assert [row.bits for row in rounding.rows] == [4, 4]


def test_rounded_networks_compute_with_the_codes_that_are_handed_on() -> None:
    model = two_layers()
    rounding = round_model_(model, "8", {}, lambda _: 0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            np.testing.assert_array_equal(rounding.codes[name].decode(), parameter.detach().numpy())
    assert [row.error_over_sigma for row in rounding.rows] == [None, None]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("factor", [1e-4, 1e-7, 1e-20])
def test_weights_as_small_as_half_precision_does_not_know_are_rounded_alike(bits: int, factor: float) -> None:
    usual, small = sparse_layer(), sparse_layer()
    small.weight.data *= factor

    def lost(layer: nn.Linear) -> float:
        values = weight_of(layer).astype(np.float64)
        error = round_weight(own(layer), bits).decode() - values
        return float(np.sqrt(np.square(error).mean() / np.square(values).mean()))

    assert 0 < lost(small) < 1.05 * lost(usual)


def test_a_vector_beside_an_embedding_is_no_matrix() -> None:
    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(20, 4)
            self.scale = nn.Parameter(torch.ones(1))

    found = roundable(nn.Sequential(Scaled(), nn.Linear(4, 3)))
    assert list(found) == ["0.weight", "1.weight"]
    assert round_weight(found["0.weight"], 8).kind == "int8"
