"""The copy of a network on which groups are traced and cuts are tried: float64, with other weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vbdcompress.compare import as_real, double_copy, flatten_output, forget_calls_
from vbdcompress.errors import TRACE_ERRORS
from vbdcompress.inputs import Inputs, call

# Standard deviation of noise on vectors about 1, which scales are, and of factors on a network's own weights
SPREAD = 0.3


def trial_copy(model: nn.Module, inputs: Inputs, seed: int) -> nn.Module:
    """Random weights and statistics, so that no zero or freshly initialised layer hides a difference.

    Near the network's own where random ones give no numbers: it may take the logarithm of a weight.

    Args:
        model: plain; left as it was.
        inputs: float64.
        seed: of the weights.
    """
    trial = _random_copy(model, seed)
    lost = _count_lost(trial, inputs)
    if lost and lost > _count_lost(double_copy(model), inputs):
        return _near_copy(model, seed)
    forget_calls_(trial)
    return trial


@torch.no_grad()
def _count_lost(model: nn.Module, inputs: Inputs) -> int:
    """Outputs that are NaN or infinite; 0 where it does not run, which is told of where groups are tried."""
    try:
        outputs = flatten_output(call(model, inputs))
    except TRACE_ERRORS:
        return 0
    return sum(int((~as_real(output).isfinite()).sum()) for output in outputs)


def _random_copy(model: nn.Module, seed: int) -> nn.Module:
    def change(name: str, parameter: Tensor, noise: Tensor) -> Tensor:
        if parameter.dim() > 1:
            return noise / math.sqrt(parameter[0].numel())
        # of both signs, where code may look at signs
        return noise if name.rpartition(".")[2] == "bias" else 1 + SPREAD * noise

    trial, generator = _changed_copy(model, seed, change)
    for name, buffer in trial.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return trial


def _near_copy(model: nn.Module, seed: int) -> nn.Module:
    """Each weight times a factor near 1; a zero becomes as large as the others are."""

    def change(_: str, parameter: Tensor, noise: Tensor) -> Tensor:
        usual = parameter.square().mean().sqrt() or 1.0
        return torch.where(parameter == 0, SPREAD * usual * noise.abs(), parameter * (1 + SPREAD * noise))

    return _changed_copy(model, seed, change)[0]


def _changed_copy(
    model: nn.Module, seed: int, change: Callable[[str, Tensor, Tensor], Tensor]
) -> tuple[nn.Module, torch.Generator]:
    """A copy, each parameter made anew from its name, itself and noise; and what draws the noise."""
    trial = double_copy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trial.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data = change(name, parameter.detach(), noise)
    return trial, generator
