"""What of the network that came out a reader of the report must know, a sentence each."""

from collections.abc import Sequence

from torch import nn

from vbdcompress.inputs import Inputs, shapes_of
from vbdcompress.preflight import outputs_of
from vbdcompress.reporting.build import StageRecord

# Fewer examples may well be of one class
ENOUGH = 32


def warn_of_frozen(original: nn.Module, stages: Sequence[StageRecord]) -> list[str]:
    """Where layers whose gradients the user took off were changed all the same."""
    if not any(parameter.requires_grad for parameter in original.parameters()):
        return [
            "The whole network is frozen (requires_grad=False): weights were removed, none was trained or "
            "fine-tuned. model.requires_grad_(True) lets it learn what the cut took."
        ]
    frozen = {
        name
        for name, module in original.named_modules()
        if (own := list(module.parameters(recurse=False))) and not any(each.requires_grad for each in own)
    }
    converted = [
        row.name
        for stage in stages
        if stage.mode == "channels"
        for row in stage.table
        if row.action == "converted" and row.name in frozen
    ]
    if not converted:
        return []
    named = ", ".join(f"'{name}'" for name in dict.fromkeys(converted))
    return [
        f"Frozen layers (requires_grad=False) were not trained, but multiplied by the gates of what they "
        f"read, and cut: {named}. --skip leaves a layer as it is."
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
        f"{told}, and the ONNX file takes no others, for the network can't be exported for all: pad or "
        "resize examples to one shape."
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
