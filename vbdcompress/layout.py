"""How the weights of convolutions lie in memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vbdcompress.errors import TRACE_ERRORS
from vbdcompress.evaluation import device_of, to_device
from vbdcompress.inputs import Inputs, call, first, in_eval_mode


def has_layout(model: nn.Module) -> bool:
    """Whether there are 2-d convolutions, which run faster with their channels last in memory."""
    return any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())


def lay_out_(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Order of the weights of 2-d convolutions in memory."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=memory_format)


def lay_out_fast_(model: nn.Module, inputs: Inputs) -> None:
    """Channels last, in place, where the network's code runs so.

    What a convolution gives lies as its weights do, and code that says `x.view(x.size(0), -1)` of it takes
    one order only.

    Args:
        inputs: some of what the network takes.
    """
    lay_out_(model, torch.channels_last)
    try:
        given = to_device(first(inputs, 2), device_of(model))
        with torch.no_grad(), in_eval_mode(model):
            call(model, given)
            model.train()  # auxiliary heads run then only; a step of norms must leave no trace
            frozen = ((name, each) for name, each in model.named_parameters() if not each.requires_grad)
            kept: dict[str, Tensor] = {name: buffer.clone() for name, buffer in model.named_buffers()}
            kept |= {name: nn.Parameter(each.clone(), requires_grad=False) for name, each in frozen}
            call(_Stateless(model, kept), given)
    except TRACE_ERRORS:  # of the order, or of what the fit is going to meet and tell of
        lay_out_(model, torch.contiguous_format)


class _Stateless(nn.Module):
    """The network on buffers, and on frozen parameters, of its own: code may write to them."""

    def __init__(self, model: nn.Module, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's."""
        return functional_call(self.model, self.given, args, kwargs)
