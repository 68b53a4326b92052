"""What several tests share: seeds, real data where it lies, tiny networks."""

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vbdcompress.exporting.latency as latency
from vbdcompress.data import DataSet, TensorBatches, load_data
from vbdcompress.vbd.layers import VBD_LAYERS, attach_posterior_


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # networks are tiny: a second thread only waits


@pytest.fixture(scope="session", autouse=True)
def _exporter_lists_its_functions_once() -> None:
    """torch's exporter reads the source of 500 functions anew each time: more than half of a small export."""
    try:
        from torch.onnx._internal.exporter import _registration
    except ImportError:  # torch's own: where a version calls it otherwise, tests take longer
        return
    registry = getattr(_registration, "ONNXRegistry", None)
    if hasattr(registry, "from_torchlib"):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


@pytest.fixture(scope="session", autouse=True)
def _garbage_is_looked_for_less_often() -> None:
    """A traced network is made of many small objects, beside the millions of torch and onnx."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _latencies_are_of_few_calls() -> None:
    """No test looks at how long they are, and seconds of them in each run are a tenth of all tests."""
    latency.MAX_CALLS = latency.MIN_CALLS


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with torchvision's data sets; the environment variable VBDCOMPRESS_DATA says where."""
    root = os.environ.get("VBDCOMPRESS_DATA")
    if not root:
        pytest.skip("VBDCOMPRESS_DATA is not set: no folder with torchvision's data sets")
    return Path(root)


@pytest.fixture(scope="session")
def digits() -> DataSet:
    """scikit-learn's 8x8 digits, normalised and split."""
    return load_data("digits")


@pytest.fixture
def small_batches() -> TensorBatches:
    """Twelve examples of five features and three classes in shuffled batches of four."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(12) % 3
    inputs = torch.randn(12, 5, generator=generator) + labels[:, None]
    return TensorBatches(inputs, labels, 4, shuffle=True)


@pytest.fixture
def convert() -> Callable[..., nn.Module]:
    """Attach a posterior to every layer that takes one, in place; returns the network."""

    def attach(model: nn.Module, log_sigma2: float = -8.0) -> nn.Module:
        for module in list(model.modules()):
            if type(module) in VBD_LAYERS:
                attach_posterior_(module, log_sigma2)
        return model

    return attach


@pytest.fixture
def make_network() -> Callable[[], nn.Module]:
    """The same small network at each call: 5 features to 3 classes."""

    def make() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))

    return make


@pytest.fixture
def assert_moments() -> Callable[..., None]:
    """Compare draws with a Gaussian's mean and variance, elementwise within five standard errors."""

    def check(draws: Tensor, mean: Tensor, variance: Tensor) -> None:
        count = draws.shape[0]
        mean_error = (variance / count).sqrt()
        variance_error = variance * (2.0 / (count - 1)) ** 0.5
        assert ((draws.mean(0) - mean).abs() <= 5 * mean_error + 1e-12).all()
        assert ((draws.var(0) - variance).abs() <= 5 * variance_error + 1e-12).all()

    return check


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The committed networks."""
    return Path(__file__).parents[1] / "zoo"
