"""Weights that are computed at each call, stored: those of torch.nn.utils.parametrizations (weight_norm,
spectral_norm, orthogonal), and those of `standardised` layers."""

from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.utils import parametrize

from vbdcompress.gather import GatherLinear
from vbdcompress.standardised import computed_weight, make_plain_, plain_kind


def store_weights_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Let modules keep what is computed in eval mode as plain weights, in place.

    Args:
        names: of modules; those that compute none stay as they are. None: all with a parametrization.
    """
    for name, module in list(model.named_modules()):
        if names is not None and name not in names:
            continue
        if parametrize.is_parametrized(module):
            own_class_(module)
            computed = module.parametrizations
            assert isinstance(computed, nn.ModuleDict)
            computed.eval()
            for weight in list(computed):
                parametrize.remove_parametrizations(module, weight, leave_parametrized=True)
        elif names is not None and plain_kind(module) is not None:
            make_plain_(module, computed_weight(module))  # a network's that is yet to be filled may be NaN


def standardised_layers(model: nn.Module) -> Iterator[str]:
    """Names of layers whose own code computes weights that may be stored; no other holds these."""
    held = [id(own) for module in model.modules() for own in module.parameters(recurse=False)]
    for name, module in model.named_modules():
        alone = all(held.count(id(own)) == 1 for own in module.parameters(recurse=False))
        if name and alone and computed_weight(module) is not None:
            yield name


def stored_layers(original: nn.Module, slim: nn.Module) -> Iterator[str]:
    """Names of modules of an original that compute weights which are plain ones in the slim network."""
    for name, module in original.named_modules():
        if parametrize.is_parametrized(module):
            if not parametrize.is_parametrized(slim.get_submodule(name)):
                yield name
        elif plain_kind(module) is not None and not isinstance(module, GatherLinear):
            left = slim.get_submodule(name)
            if plain_kind(left) is None or isinstance(left, GatherLinear):
                yield name


def own_class_(module: nn.Module) -> None:
    """A class of its own: a deep copy shares its original's, from which torch would delete the parameter."""
    shared = type(module)
    content = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)
