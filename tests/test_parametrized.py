"""Weights that parametrizations compute are stored, and the network goes the whole way."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import vbdcompress
from vbdcompress import compress, convert
from vbdcompress.parametrized import store_weights_


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


INPUTS = torch.randn(60, 3, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(60) % 3


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
def test_a_parametrized_network_is_compressed_exported_and_loaded(mode: Any, tmp_path: Any) -> None:
    model = vocoder()
    batches = [(INPUTS[start : start + 20], LABELS[start : start + 20]) for start in (0, 20, 40)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no test set
        found = compress(
            model, batches, validation=batches, mode=mode, epochs=40, beta=30.0, finetune_epochs=1
        )
    assert parametrize.is_parametrized(model[0])
    size = found.report["size"]
    assert size["after"]["nonzeros"] < 0.9 * size["before"]["nonzeros"]
    assert "0" in [row["name"] for row in found.report["layers"]]
    assert not any("norm" in name for name in found.report["uncounted_ops"])  # no file computes it
    found.export(tmp_path)
    again = vbdcompress.load_slim(tmp_path / "slim.safetensors", vocoder())

    def outputs(network: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = network.eval()(INPUTS)
        return result

    assert torch.equal(outputs(again), outputs(found.model))
