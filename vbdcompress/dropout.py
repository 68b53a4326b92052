"""A network's own dropout while it is fitted: the posterior's noise stands in its place."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from vbdcompress.attention import Opened

# Modules that drop out by themselves hold their rate in one of these
HOLDERS = (nn.MultiheadAttention, nn.RNNBase, Opened)
RATES = ("dropout", "attention_dropout")


@contextmanager
def scaled_dropout(model: nn.Module, share: float) -> Iterator[None]:
    """Every dropout of the network at `share` of its rate; afterwards each is as it was.

    Rates that the network's code passes to torch.nn.functional by itself are out of reach.

    Args:
        share: in [0, 1].
    """
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
            yield module, "p"
        elif isinstance(module, HOLDERS):
            yield from ((module, name) for name in RATES if isinstance(getattr(module, name, None), float))
