"""Weight-mode layers: torch's own layers with a Gaussian posterior on every weight.

A layer is converted in place by changing its class, as torch.nn.utils.parametrize does: every
reference to the module, hook and attribute stays, a shared module is converted once, and
`detach_posterior_` restores exactly what was there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.gather import GatherLinear
from vbdcompress.linear import OpenLinear
from vbdcompress.vbd.posterior import KEEP_ALL, HasPosterior, draw


class WeightPosterior(HasPosterior, nn.Module):
    """Base of the weight-mode layers: q(w) = N(theta, sigma^2), one alpha for each weight.

    Training uses the local reparameterisation (Kingma, Salimans, Welling 2015): the output of a
    layer that is linear in w is Gaussian, out ~ N(A theta + b, A^2 sigma^2), so it is drawn
    directly, one draw for each example and output. The bias is deterministic. In eval mode the
    layer is deterministic with theta where log_alpha < threshold and 0 elsewhere.

    `weight` is theta, so a state_dict of the plain layer loads; `log_sigma2` has its shape.
    """

    weight: Tensor
    bias: Any  # Tensor or None; torch declares it differently in each layer
    log_sigma2: nn.Parameter

    def posterior(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.log_sigma2

    def linear_map(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The plain layer's function with the given weight and bias. What a subclass must say."""
        raise TypeError(f"{type(self).__name__} does not define linear_map")

    def moments(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance of the output over q(w); both the output's shape."""
        mean = self.linear_map(input, self.weight, self.bias, *args, **kwargs)
        sigma2 = self.log_sigma2.exp().to(self.weight.dtype)
        if mean.dtype == torch.float16:
            # The square of an input above 255 overflows float16, and a variance below 6e-8 is 0 there
            with torch.autocast(input.device.type, enabled=False):
                squares = input.float().square()
                return mean, self.linear_map(squares, sigma2.float(), None, *args, **kwargs)
        return mean, self.linear_map(input.square(), sigma2, None, *args, **kwargs)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training:
            return self.linear_map(input, self.masked_theta(), self.bias, *args, **kwargs)
        return draw(*self.moments(input, *args, **kwargs))


class VBDLinear(WeightPosterior, nn.Linear):
    """nn.Linear with a posterior on its weights."""

    def linear_map(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)


class VBDOpenLinear(VBDLinear, OpenLinear):
    """OpenLinear with a posterior on its weights."""


class VBDGatherLinear(WeightPosterior, GatherLinear):
    """GatherLinear with a posterior on its weights."""

    def linear_map(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input.index_select(-1, self.input_index), weight, bias)


class _ConvPosterior(WeightPosterior):
    def linear_map(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # torch's own method: padding modes, groups, strides and dilation as in the plain layer
        output: Tensor = self._conv_forward(input, weight, bias)  # type: ignore[operator]
        return output


class VBDConv1d(_ConvPosterior, nn.Conv1d):
    """nn.Conv1d with a posterior on its weights."""


class VBDConv2d(_ConvPosterior, nn.Conv2d):
    """nn.Conv2d with a posterior on its weights."""


class VBDConv3d(_ConvPosterior, nn.Conv3d):
    """nn.Conv3d with a posterior on its weights."""


_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _ConvTransposePosterior(WeightPosterior):
    def linear_map(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
    ) -> Tensor:
        dims = len(self.kernel_size)  # type: ignore[arg-type]
        padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        transpose: Any = _CONV_TRANSPOSE[dims]
        output: Tensor = transpose(
            input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation
        )
        return output


class VBDConvTranspose1d(_ConvTransposePosterior, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with a posterior on its weights."""


class VBDConvTranspose2d(_ConvTransposePosterior, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with a posterior on its weights."""


class VBDConvTranspose3d(_ConvTransposePosterior, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with a posterior on its weights."""


VBD_LAYERS: dict[type[nn.Module], type[WeightPosterior]] = {
    nn.Linear: VBDLinear,
    OpenLinear: VBDOpenLinear,
    GatherLinear: VBDGatherLinear,
    nn.Conv1d: VBDConv1d,
    nn.Conv2d: VBDConv2d,
    nn.Conv3d: VBDConv3d,
    nn.ConvTranspose1d: VBDConvTranspose1d,
    nn.ConvTranspose2d: VBDConvTranspose2d,
    nn.ConvTranspose3d: VBDConvTranspose3d,
}
"""Exact type of a plain layer -> its weight-mode class. A subclass may compute something else: not taken."""

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {vbd: plain for plain, vbd in VBD_LAYERS.items()}


def attach_posterior_(layer: nn.Module, log_sigma2: float) -> None:
    """Turn a plain layer into its weight-mode class, in place; theta is its weight.

    Args:
        layer: its exact type is a key of VBD_LAYERS.
        log_sigma2: initial log variance of every weight.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.__class__ = VBD_LAYERS[type(layer)]
    layer.log_sigma2 = nn.Parameter(weight.detach().new_full(weight.shape, log_sigma2))
    assert isinstance(layer, WeightPosterior)
    layer.threshold = KEEP_ALL


def detach_posterior_(layer: nn.Module) -> None:
    """Undo `attach_posterior_`, in place; the weight is theta where kept, 0 elsewhere."""
    assert isinstance(layer, WeightPosterior)
    kept = layer.masked_theta().detach()
    layer.weight.data.copy_(kept)
    del layer.log_sigma2, layer.threshold
    layer.__class__ = _PLAIN[type(layer)]  # type: ignore[assignment]
