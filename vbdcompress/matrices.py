"""Which parameters are matrices of weights, and which are vectors, scales and tables beside them."""

import re

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def why_no_matrix(module: nn.Module, name: str, parameter: Tensor) -> str | None:
    """Why a parameter outside the standard layers holds no weights to learn few of; None where it does.

    Args:
        module: that owns it.
        name: its own, or dotted.
    """
    if not parameter.is_floating_point():
        return f"of type {parameter.dtype}"
    if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm):
        return "a scale or shift of a normalisation"
    if parameter.dim() < 2 or parameter.numel() == max(parameter.shape):
        return "a vector: a bias, scale or token"
    words = set(re.split(r"[^a-z]+", name.rsplit(".", 1)[-1].lower()))
    flat = parameter.shape[0] == 1 and parameter.dim() <= 3
    if flat or any(word.startswith(("pos", "bias")) or word.endswith("bias") for word in words):
        return "a table of positions or biases"
    return None
