"""Modules of a network's own that do what nn.Linear does, such as Conv1D in the transformers library."""

import copy
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.compare import gives_the_same


class OpenLinear(nn.Linear):
    """nn.Linear in the place of a module that computes the same from a matrix and a bias of its own."""


def open_linear(module: nn.Module, tied: Collection[int] = ()) -> OpenLinear | None:
    """A module that multiplies by its matrix, or by its transpose, and adds its bias; None for others.

    Known by what it computes: it holds a matrix, at most a bias, and nothing else.

    Args:
        tied: ids of parameters that others hold, too: what is turned round would be theirs no more.
    """
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    biases = [parameter for parameter in held if parameter.dim() == 1]
    matrices = [parameter for parameter in held if parameter.dim() == 2]
    beside = module._modules or module._buffers or len(held) > len(matrices) + len(biases)
    torchs = type(module).__module__.startswith("torch.") or isinstance(module, nn.Linear)
    if torchs or beside or len(matrices) != 1 or len(biases) > 1 or not all(map(_is_real, held)):
        return None
    matrix, bias = matrices[0], next(iter(biases), None)
    for transposed in (False, True):
        weight = matrix.t() if transposed else matrix
        if transposed and id(matrix) in tied:
            return None
        if (bias is None or len(bias) == len(weight)) and _computes(module, transposed):
            layer = OpenLinear(weight.shape[1], len(weight), bias is not None, device="meta")
            turned = nn.Parameter(weight.detach().contiguous(), matrix.requires_grad)
            layer.weight = turned if transposed else matrix
            layer.register_parameter("bias", bias)
            return layer.train(module.training)
    return None


def _is_real(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.layout == torch.strided


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def _computes(module: nn.Module, transposed: bool) -> bool:
    """Whether it is that, in training too, whatever its weights are."""
    trial = copy.deepcopy(module).cpu().double()
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    held = list(trial.parameters())
    (matrix,) = (parameter for parameter in held if parameter.dim() == 2)
    weight, bias = (matrix.t() if transposed else matrix), next((p for p in held if p.dim() == 1), None)
    given = torch.randn(3, 5, weight.shape[1], generator=generator, dtype=weight.dtype)
    return all(
        gives_the_same(trial.train(training), lambda x: F.linear(x, weight, bias), given)
        for training in (False, True)
    )
