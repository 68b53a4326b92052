"""A posterior on any parameter, by sampling the weight itself.

For parameters whose layer does not compute one linear map that could be drawn at its output:
attention projections, LSTM and GRU weights, embeddings, bare nn.Parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vbdcompress.parametrized import own_class_
from vbdcompress.vbd.posterior import KEEP_ALL, HasPosterior, sample


class SampledWeight(HasPosterior, nn.Module):
    """Parametrization w ~ N(theta, sigma^2): a draw for each forward pass while training.

    theta is the parametrized tensor's `original`. One draw serves the whole batch, so gradients
    are noisier than with the local reparameterisation of `vbd.layers`.

    Args:
        theta: the parameter.
        log_sigma2: initial log variance of each of its weights.
        order: names of its module's parameters as they stood, to put them back in that order.
    """

    def __init__(self, theta: Tensor, log_sigma2: float, order: tuple[str, ...]) -> None:
        super().__init__()
        self.log_sigma2 = nn.Parameter(theta.detach().new_full(theta.shape, log_sigma2))
        self.threshold = KEEP_ALL
        self.order = order

    def forward(self, theta: Tensor) -> Tensor:
        if self.training:
            return sample(theta, self.log_sigma2)
        return self.mask(theta, self.log_sigma2)


def attach_sampled_(module: nn.Module, name: str, log_sigma2: float) -> None:
    """Give the parameter `name` of `module` a sampled posterior, in place."""
    theta = getattr(module, name)
    order = tuple(module._parameters)
    if parametrize.is_parametrized(module):  # others of its parameters have left that dict already
        first = next(iter(module.parametrizations.values()))[0]  # type: ignore[operator]
        order = first.order if isinstance(first, SampledWeight) else order
    # unsafe: skips a trial call whose random draw could never equal the original
    parametrize.register_parametrization(module, name, SampledWeight(theta, log_sigma2, order), unsafe=True)
    if isinstance(module, nn.RNNBase):
        # torch's recurrent layers cache a list of their weights, which would stay at one draw. The
        # class is this module's own since it was parametrized; a hook that refills the cache would
        # leave the last draw and its graph there, and a deep copy then fails.
        vars(module).pop("_flat_weights", None)
        type(module)._flat_weights = property(_read_weights, _cache_nothing)  # type: ignore[assignment]


def detach_sampled_(module: nn.Module, name: str) -> None:
    """Undo `attach_sampled_`, in place; the parameter is theta where kept, 0 elsewhere."""
    parametrization = module.parametrizations[name][0]  # type: ignore[index]
    assert isinstance(parametrization, SampledWeight)
    theta = module.parametrizations[name].original  # type: ignore[index, union-attr]
    kept = parametrization.mask(theta, parametrization.log_sigma2).detach().clone()
    own_class_(module)
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    with torch.no_grad():
        getattr(module, name).copy_(kept)
    for earlier in parametrization.order:
        if earlier in module._parameters:
            module._parameters[earlier] = module._parameters.pop(earlier)
    if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
        module._flat_weights = _read_weights(module)


def _read_weights(module: nn.RNNBase) -> list[Any]:
    return [getattr(module, name) for name in module._flat_weights_names]


def _cache_nothing(module: nn.RNNBase, weights: list[Any]) -> None:
    """torch assigns the list anew when the module moves; it is read anew anyway."""
