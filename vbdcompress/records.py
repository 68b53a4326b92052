"""What the stages hand to each other: frozen, plain, printable."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Errors are sums of floats: 0.7 + 0.1 is less than 0.8
TIE = 1e-9


def held_out(split: Mapping[str, Any] | None, examples: int) -> bool:
    """Whether training is known to have left out what a split of so many examples holds back now.

    Args:
        split: {"fraction", "seed"}, perhaps "held_out", and "examples" that were split: of another number
            the same seed draws others.
    """
    if split is None or split.get("held_out", True) is False:
        return False
    return bool(split.get("examples", examples) == examples)


@dataclass(frozen=True)
class InputSpec:
    """What a network takes: pixels scaled to [0, 1], then (x - mean) / std for each channel.

    Attributes:
        shape: of one example without the batch, (channels, height, width) for images.
        mean, std: for each channel, after scaling; empty where the user normalises himself.
        name: of the ONNX input.
        embedded: the ONNX file normalises by itself: it takes pixels as they are, uint8 from 0 to 255.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    name: str = "input"
    embedded: bool = False

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "InputSpec":
        """From plain JSON types. Raises KeyError, TypeError or ValueError where it is none."""
        shape, mean, std = (content[key] for key in ("shape", "mean", "std"))
        return cls(
            tuple(map(int, shape)),
            tuple(map(float, mean)),
            tuple(map(float, std)),
            str(content["name"]),
            bool(content.get("embedded", False)),
        )


@dataclass(frozen=True)
class LayerRow:
    """One row of what `convert` did: a layer or parameter, and why it was left where it was.

    Attributes:
        name: dotted name.
        kind: class of the layer ("Conv2d") or "Parameter".
        action: "converted" or "left".
        reason: how it was converted, or why it was left.
        parameters: numbers in it.
    """

    name: str
    kind: str
    action: str
    reason: str
    parameters: int


@dataclass(frozen=True)
class EpochRow:
    """One line of the epoch log.

    Attributes:
        epoch: counted from 1.
        nll, kl: means over the epoch, nats per example; kl already divided by num_data.
        beta: weight of the KL in this epoch; 0 without posteriors.
        error: on the validation set, percent; None where there is none.
        sparsity: fraction of posteriors with log_alpha >= threshold; None without posteriors.
        learning_rate: of theta.
        seconds: wall clock of the epoch, without validation.
        examples_per_second: over all processes.
    """

    epoch: int
    nll: float
    kl: float
    beta: float
    error: float | None
    sparsity: float | None
    learning_rate: float
    seconds: float
    examples_per_second: float


@dataclass(frozen=True)
class Size:
    """How large a network is.

    Attributes:
        parameters: numbers in all parameters.
        nonzeros: of these, not zero.
        macs: multiply-accumulates of one example.
        bytes: of its ONNX file: measured where the file was written, else estimated.
    """

    parameters: int
    nonzeros: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class CurvePoint:
    """The network masked at one threshold: validation error in percent, and its size once slimmed."""

    threshold: float
    error: float
    size: Size


@dataclass(frozen=True)
class LayerSize:
    """One layer's parameters, nonzeros and MACs."""

    name: str
    kind: str
    parameters: int
    nonzeros: int
    macs: int


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one onnxruntime call, original and slim file interleaved in one run."""

    batch: int
    original_ms: float
    slim_ms: float
    calls: int


@dataclass(frozen=True)
class PackedTensor:
    """A weight in an ONNX file that standard operators rebuild.

    Attributes:
        name: of the tensor.
        kind: what is stored: "gaps and float32", "int8", "gaps and codebook of 16".
        shape: of the tensor.
        dense_bytes, bytes: as a dense float32 tensor, and with all that rebuilds it.
        exact: it is rebuilt to the last bit; else a scale was folded into it, to 1e-6.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dense_bytes: int
    bytes: int
    exact: bool


@dataclass(frozen=True)
class OutputRow:
    """One output of an ONNX file.

    Attributes:
        name: of the tensor.
        shape: with the batch; a size that the inputs decide is a name.
        dtype: as numpy calls it.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class ExportCheck:
    """How the ONNX file was verified against torch on real samples.

    Attributes:
        opset: of the file.
        bytes: of the file.
        batch_sizes: that were run.
        max_difference: largest |onnxruntime - torch| over the largest |torch|.
        tolerance: what was allowed.
        packed: weights that are rebuilt from fewer bytes.
        open_dims: of each input, the dimensions beside the batch that may have any size.
        outputs: what the file gives.
    """

    opset: int
    bytes: int
    batch_sizes: tuple[int, ...]
    max_difference: float
    tolerance: float
    packed: tuple[PackedTensor, ...] = ()
    open_dims: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[OutputRow, ...] = ()


@dataclass(frozen=True)
class GroupRow:
    """Channels of a group before and after, and why none could go where it stayed whole."""

    name: str
    size: int
    kept: int
    whole_because: str | None


@dataclass(frozen=True)
class Selection:
    """How the threshold was chosen.

    Attributes:
        rule: "threshold" or "budget".
        threshold: of log_alpha; infinite where nothing is removed.
        baseline_error: of the original on validation, percent.
        limits: absolute bounds by field of `Size`.
        explanation: one phrase for a reader.
    """

    rule: str
    threshold: float
    baseline_error: float
    limits: dict[str, int]
    explanation: str
