"""Weights that torch.nn.utils.parametrizations compute: weight_norm, spectral_norm, orthogonal."""

from collections.abc import Collection

from torch import nn
from torch.nn.utils import parametrize


def store_weights_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Let modules keep what their parametrizations compute in eval mode as plain weights, in place.

    Args:
        names: of modules; those without a parametrization stay as they are. None: all.
    """
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module) and (names is None or name in names):
            own_class_(module)
            computed = module.parametrizations
            assert isinstance(computed, nn.ModuleDict)
            computed.eval()
            for weight in list(computed):
                parametrize.remove_parametrizations(module, weight, leave_parametrized=True)


def own_class_(module: nn.Module) -> None:
    """A class of its own: a deep copy shares its original's, from which torch would delete the parameter."""
    shared = type(module)
    content = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)
