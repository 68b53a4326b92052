"""What of the network that came out a reader of the report must know, a sentence each."""

from collections.abc import Sequence

import torch
from torch import nn

from vbdcompress.inputs import Inputs, shapes_of
from vbdcompress.preflight import outputs_of

# Fewer examples may well be of one class
ENOUGH = 32


def warn_of_frozen(original: nn.Module, slimmed: nn.Module) -> list[str]:
    """Where layers whose gradients the user took off were changed all the same."""
    if not any(parameter.requires_grad for parameter in original.parameters()):
        return [
            "The whole network is frozen (requires_grad=False): weights were removed, none was trained or "
            "fine-tuned. model.requires_grad_(True) lets it learn what the cut took."
        ]
    after = dict(slimmed.named_parameters())
    changed = [
        name
        for name, parameter in original.named_parameters()
        if not parameter.requires_grad
        and (name not in after or not torch.equal(after[name].detach().cpu(), parameter.detach().cpu()))
    ]
    if not changed:
        return []
    layers = dict.fromkeys(name.rpartition(".")[0] or name for name in changed)
    return [
        "Frozen layers (requires_grad=False) were not trained, but cut, rounded, or multiplied by gates of "
        f"what they read: {', '.join(map(repr, layers))}. --skip leaves a layer uncut."
    ]


def warn_of_shapes(samples: Inputs, found: Sequence[Inputs], taken: Sequence[Inputs]) -> list[str]:
    """Where batches differ in shape.

    Args:
        samples: what MACs are counted with.
        found: inputs of other shapes.
        taken: those that the ONNX file takes.
    """
    if not found:
        return []
    one, other = (", ".join(str(list(size[1:])) for size in shapes_of(each)) for each in (samples, found[0]))
    told = f"Batches differ in shape: examples of {one} and of {other}, say. MACs and latency are for {one}"
    if taken:
        return [f"{told}; the ONNX file takes them all."]
    return [
        f"{told}, and the ONNX file takes no others, for the network can't be exported for all: give "
        "all examples one shape."
    ]


def warn_of_one_class(original: nn.Module, slimmed: nn.Module, samples: Inputs) -> list[str]:
    """Where one class is all that is left of several."""
    outputs = [outputs_of(model, samples) for model in (original, slimmed)]
    if any(len(output) != 1 or output[0].dim() != 2 or len(output[0]) < ENOUGH for output in outputs):
        return []
    classes = [len(set(output.argmax(1).tolist())) for (output,) in outputs]
    if classes[1] > 1 or classes[0] == 1:
        return []
    return [
        f"The slim network names one class for all of {len(outputs[0][0])} training examples: too much was "
        "removed. Allow it more parameters, or fit longer."
    ]
