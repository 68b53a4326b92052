"""A network's own noise while it is fitted: the posterior's stands in its place."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from vbdcompress.opening import Opened

# Modules that drop out by themselves hold their rate in one of these
HOLDERS = (nn.MultiheadAttention, nn.RNNBase, Opened)
RATES = ("dropout", "attention_dropout")
# Stochastic depth drops whole branches: torchvision's, and timm's, which need not be there
BRANCHES = {"StochasticDepth": "p", "DropPath": "drop_prob"}


@contextmanager
def scaled_dropout(model: nn.Module, share: float) -> Iterator[None]:
    """Every dropout and stochastic depth of the network at `share` of its rate; afterwards each is as it was.

    Rates that the network's code passes to torch.nn.functional by itself are out of reach. A copy made
    meanwhile keeps the scaled rates.

    Args:
        share: in [0, 1]; at 1 nothing is touched.
    """
    if share == 1:
        yield
        return
    before = [(module, name, getattr(module, name)) for module, name in _rates(model)]
    for module, name, rate in before:
        setattr(module, name, share * rate)
    try:
        yield
    finally:
        for module, name, rate in before:
            setattr(module, name, rate)


def _rates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where a module keeps the rate at which it drops out."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            names: tuple[str, ...] = ("p",)
        elif isinstance(module, HOLDERS):
            names = RATES
        else:
            names = (BRANCHES.get(type(module).__name__, ""),)
        # what is computed, or learned, is the module's own affair
        yield from ((module, name) for name in names if isinstance(vars(module).get(name), float | int))
