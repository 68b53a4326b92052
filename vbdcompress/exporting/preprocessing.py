"""The normalisation inside the network: a file that takes pixels as they come from a picture."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.errors import ConfigError
from vbdcompress.inputs import Inputs
from vbdcompress.records import InputSpec

PIXEL_MAX = 255
# Of inputs that were normalised in float32, or augmented with interpolation
ROUNDING = 0.01
# Share of values that a sharpening resize may leave beyond black and white
OVERSHOOT = 0.05


class TakesPixels(nn.Module):
    """A network behind (pixels / 255 - mean) / std: [batch, channels, ...] uint8 in, its output out."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.model = model
        for name in ("mean", "std"):
            values = torch.tensor(getattr(spec, name), dtype=torch.float32)
            self.register_buffer(name, values.view(-1, *[1] * (len(spec.shape) - 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.model((pixels.float() / PIXEL_MAX - self.mean) / self.std)
        return output


def inputs_for(spec: InputSpec, inputs: Inputs) -> Inputs:
    """What a file takes for normalised inputs: their pixels where it normalises by itself."""
    return to_pixels(inputs, spec) if spec.embedded else inputs


def as_served(batches: Iterable[Any], spec: InputSpec) -> Iterator[Any]:
    """(input, target) batches as the file's network sees them: one of pixels rounds what were no bytes."""
    for inputs, target in batches:
        if spec.embedded:
            mean, std = _of_channels(spec, inputs.device)
            yield (to_pixels(inputs, spec).float() / PIXEL_MAX - mean) / std, target
        else:
            yield inputs, target


def _of_channels(spec: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, broadcastable to a batch."""
    shape = [-1, *[1] * (len(spec.shape) - 1)]
    mean, std = (torch.tensor(values, device=device).view(shape) for values in (spec.mean, spec.std))
    return mean, std


def check_pixels(inputs: Tensor, spec: InputSpec) -> None:
    """Raise ConfigError where normalised inputs did not come from pixels, so that none give them back."""
    mean, std = _of_channels(spec, torch.device("cpu"))
    brightness = inputs.cpu() * std + mean
    low, high = float(brightness.min()), float(brightness.max())
    outside = (brightness < -ROUNDING) | (brightness > 1 + ROUNDING)
    if float(outside.float().mean()) > OVERSHOOT:
        raise ConfigError(
            "embed_preprocessing",
            f"before normalisation the inputs are from {low:.3g} to {high:.3g}, pixels are from 0 to 1.",
            "Check mean and std, or leave embed_preprocessing out: such inputs are no bytes.",
        )


def to_pixels(inputs: Tensor, spec: InputSpec) -> Tensor:
    """The pixels, uint8, that normalised inputs came from: [batch, channels, ...] both.

    To the bit where they were bytes; what was measured finer is rounded.
    """
    mean, std = _of_channels(spec, inputs.device)
    return ((inputs * std + mean) * PIXEL_MAX).round().clamp(0, PIXEL_MAX).to(torch.uint8)
