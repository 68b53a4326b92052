"""How the weights of convolutions lie in memory."""

import torch
from torch import nn


def lay_out_(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Order of the weights of 2-d convolutions in memory; channels last is what they run fastest in."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=memory_format)
