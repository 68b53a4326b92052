"""Batch norm's running statistics: taken anew once a network is cut, or left where the norm is frozen."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vbdcompress.data.loaders import drawn_from, seed_generators
from vbdcompress.evaluation import device_of, to_device
from vbdcompress.inputs import batch_size, call, input_of, named_batch_of_one, noting_calls
from vbdcompress.vbd.posterior import let_draw_

# For the statistics of batch norm: of a network that stays, and of each of the curve's many
STATISTICS_EXAMPLES = 10_000
CURVE_EXAMPLES = 2_000


def train_(model: nn.Module) -> None:
    """Training mode, in place, but for batch norm that is frozen: that normalises as it always will."""
    model.train()
    let_draw_(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and _is_frozen(module):
            module.eval()


def _is_frozen(norm: nn.Module) -> bool:
    """Whether the user took gradients off its weights; one without weights is not frozen."""
    own = list(norm.parameters())
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def _norms_that_train(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those whose statistics a fit moves; all modules keep their modes."""
    modes = [(module, module.training) for module in model.modules()]
    train_(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.training
    }
    for module, mode in modes:
        module.training = mode
    return norms


class _Average:
    """Before each call of one norm: an average over all that it is given, in however many calls a batch."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, norm: Any, args: Any, kwargs: Any) -> None:
        given = len(input_of(args, kwargs))
        self.seen += given
        norm.momentum = given / max(1, self.seen)


@torch.no_grad()
def reestimate_batch_norm_(
    model: nn.Module, loader: Iterable[Any], examples: int = STATISTICS_EXAMPLES, seed: int = 0
) -> None:
    """Take batch norm's running statistics anew, in place: those of the fit were taken under noise.

    Frozen norms keep theirs, under which the fit was made, and those that do not run in eval mode. So do
    those that the network's own `train` keeps in eval mode.

    Args:
        loader: training batches, (input, target).
        examples: batches are taken until they hold as many.
        seed: of the order that a loader that shuffles draws: a run that goes on takes the same examples.
    Raises:
        FitError: a batch of one example, of which a norm can't take statistics.
    """
    norms = _norms_that_train(model)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms.values()]
    before = [copy.deepcopy(dict(norm.named_buffers(recurse=False))) for norm in norms.values()]
    model.eval()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.train()
    hooks = [norm.register_forward_pre_hook(_Average(), with_kwargs=True) for norm in norms.values()]
    device, seen = device_of(model), 0
    with drawn_from(seed), named_batch_of_one("batch norm"), noting_calls(model) as called:
        seed_generators(loader, seed)
        for inputs, _ in loader:
            seen += batch_size(inputs)
            for norm in norms.values():  # for code that reads it past the norm's call
                norm.momentum = batch_size(inputs) / seen
            call(model, to_device(inputs, device))
            if seen >= examples:
                break
    for hook in hooks:
        hook.remove()
    for (name, norm), momentum, kept in zip(norms.items(), momenta, before, strict=True):
        norm.momentum = momentum
        norm.eval()
        if name not in called and not norm.num_batches_tracked:  # of a head for training, say
            for own, buffer in kept.items():
                norm.get_buffer(own).copy_(buffer)
