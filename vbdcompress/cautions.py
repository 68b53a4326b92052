"""What of the network that came out a reader of the report must know, a sentence each."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vbdcompress.data.loaders import drawn_from
from vbdcompress.inputs import Inputs, shapes_of
from vbdcompress.preflight import outputs_of
from vbdcompress.sources import LOOKED_AT, Sources

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


def warn_of_numbers(sources: Sources, samples: Inputs, seed: int) -> list[str]:
    """Where a number among the inputs is not the same in all batches: a file has no input for it.

    Args:
        samples: of the first batch.
        seed: of the order in which loaders that shuffle draw theirs.
    """
    held = _numbers_of(samples)
    if not held:
        return []
    with drawn_from(seed):
        others = (_numbers_of(inputs) for inputs, _ in islice(sources.train, LOOKED_AT))
        other = next((numbers for numbers in others if numbers != held), held)
    differing = [pair for pair in zip(held, other, strict=False) if pair[0] != pair[1]]
    if not differing:
        return []
    told = ", ".join(f"{one!r} and {two!r}" for one, two in differing)
    return [
        f"The inputs hold numbers that differ from batch to batch: {told}. The ONNX file holds those of the "
        "first batch. A number that is an input of its own is a tensor with one for each example."
    ]


def _numbers_of(inputs: Inputs) -> list[Any]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, int | float | str)]


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
