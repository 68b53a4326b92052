"""Which parameters a loss can't train: what lies behind detach or no_grad in the network's code."""

import copy

import torch
from torch import nn

from vbdcompress.compare import flatten_output
from vbdcompress.errors import TRACE_ERRORS
from vbdcompress.inputs import Inputs, call, noting_calls
from vbdcompress.surgery.plain import without_checkpointing

NO_GRADIENT = "no gradient reaches it: the network's own code detaches it, or does not use it"


@without_checkpointing()
def without_gradient(model: nn.Module, example: Inputs) -> set[str]:
    """Names of the parameters that no gradient reaches from the network's output.

    Their posterior would follow the KL alone, and all of them would go. Empty where that can't be told: a
    network that takes more in training than the example. Layers that the example is not routed to do not
    count: others may be.

    Args:
        model: plain; left as it was. Frozen parameters count as if they were not.
        example: a batch of inputs.
    """
    trial = copy.deepcopy(model).cpu()
    parameters = {name: each for name, each in trial.named_parameters() if each.is_floating_point()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    blind = set(parameters)
    with noting_calls(trial) as called:
        for training in (True, False):  # a layer may be left out at random in training
            try:
                trial.train(training)
                blind -= _reached(trial, example, parameters)
            except TRACE_ERRORS:
                return set()
    used = called | {_owner(name) for name in parameters.keys() - blind}
    return {name for name in blind if _owner(name) in used}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _reached(model: nn.Module, example: Inputs, parameters: dict[str, nn.Parameter]) -> set[str]:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = [output for output in flatten_output(call(model, example)) if output.requires_grad]
        if not outputs:
            return set()
        starts = [torch.ones_like(output) for output in outputs]
        slopes = torch.autograd.grad(outputs, list(parameters.values()), starts, allow_unused=True)
    return {name for name, slope in zip(parameters, slopes, strict=True) if slope is not None}
