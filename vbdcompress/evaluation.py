"""How outputs are judged, and the error of a network on a set, in percent."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.config import RunConfig
from vbdcompress.errors import DataError
from vbdcompress.inputs import call, in_eval_mode, map_tensors, tensors_of

Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[Any, Any], Tensor]

# Of errors that users compute, in float32
ROUNDING = 1e-4


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Mean negative log likelihood in nats; output [batch, classes], or with such `logits`; target [batch].

    Raises:
        DataError: the output is no tensor: several heads need a loss of the user's own.
    """
    return F.cross_entropy(one_head(output), target)


def logits_of(output: Any) -> Any:
    """The field `logits` of an output that has one, as of the transformers library; others as they are."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output


def one_head(output: Any) -> Tensor:
    """The logits. Raises DataError where there are none: in training, auxiliary heads give several."""
    output = logits_of(output)
    if isinstance(output, Tensor):
        return output
    raise DataError(
        "network",
        f"gives a {type(output).__name__} in training mode; cross entropy and distillation need logits "
        "[batch, classes].",
        "Switch auxiliary heads off (aux_logits=False), or pass a loss: compress(..., loss=, distill=0)",
    )


def top1_error(output: Any, target: Tensor) -> Tensor:
    """[batch], 1 where the most likely class is not the target, else 0; output as of `cross_entropy`."""
    errors: Tensor = logits_of(output).argmax(1) != target
    return errors.float()


def name_of(judge: Callable[..., Any]) -> str:
    """What a loss or metric is called; of a partial, with the plain values that it was given."""
    if isinstance(judge, partial):
        given = [("", each) for each in judge.args]
        given += [(f"{key}=", value) for key, value in sorted(judge.keywords.items())]
        plain = [f"{key}{value!r}" for key, value in given if isinstance(value, int | float | str)]
        return f"{name_of(judge.func)}({', '.join(plain)})"
    return str(getattr(judge, "__qualname__", type(judge).__qualname__))


@dataclass(frozen=True)
class Judge:
    """How outputs are judged: loss while training, metric when measured."""

    loss: Loss = cross_entropy
    metric: Metric = top1_error

    def follows(self, config: RunConfig) -> bool:
        """Whether the fit follows the original's outputs: those that an own loss reads need not be logits."""
        return self.loss is cross_entropy if config.distill is None else config.distill > 0


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Tensors in a batch (bare, or in tuples, lists and dicts) on the device, as gradients can be taken by.

    Args:
        dtype: of floating point tensors; None leaves them as they are.
    """
    waits = device.type == "cpu"  # where numbers may be read before a copy that nobody waits for is there

    def move(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else None
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            tensor = tensor.clone()  # what was made under inference_mode can't be kept for backward
        return tensor.to(device, kind, non_blocking=not waits)

    return map_tensors(value, move)


def device_of(model: nn.Module) -> torch.device:
    """Where the network lies, by its first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def with_gradients() -> Iterator[None]:
    """Inside, gradients are kept, also where the caller switched them off, and nothing is cast by itself."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, numbers have the precision that the network has, whatever the caller switched on."""
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def whole_float32(device: torch.device) -> Iterator[None]:
    """No TF32 on a GPU: the error that is measured is to be that of the file, in float32."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    # torch 2.9 gave each kind of layer a setting; the old ones can't be read where they contradict them
    parts = [getattr(cudnn, name) for name in ("conv", "rnn") if hasattr(cudnn, name)]
    before = [part.fp32_precision for part in parts]
    allowed = all(precision == "tf32" for precision in before) if parts else cudnn.allow_tf32
    products = getattr(matmul, "fp32_precision", None)
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # it contradicts the new setting, which the user chose
        legacy = None
    cudnn.allow_tf32 = False
    for part in parts:
        part.fp32_precision = "ieee"
    torch.set_float32_matmul_precision(
        "highest"
    )  # both settings: torch refuses to multiply where they differ
    try:
        yield
    finally:
        cudnn.allow_tf32 = allowed
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        if products is not None:
            matmul.fp32_precision = products


def _count_unfit(inputs: Any) -> Tensor | int:
    """Examples that hold NaN or infinity."""
    real = [tensor for tensor in tensors_of(inputs) if tensor.is_floating_point() and tensor.dim()]
    unfit = [
        ~tensor.isfinite().flatten(1).all(1) if tensor.dim() > 1 else ~tensor.isfinite() for tensor in real
    ]
    alike = [each for each in unfit if len(each) == len(unfit[0])]
    return torch.stack(alike).any(0).sum() if alike else 0


@torch.no_grad()
def measure_error(
    model: nn.Module, batches: Iterable[Any], metric: Metric = top1_error, *, bounded: bool = False
) -> float:
    """Mean of `metric` over a set in percent, in eval mode; the network's mode is put back.

    Args:
        batches: yields (input, target).
        metric: (output, target) -> [batch], each example's error in [0, 1].
        bounded: look whether they are, and whether the inputs are numbers; a network that was cut to noise
            may exceed a scale that is made for trained ones, and where it has none, as a correlation with
            a constant, that is an error of 1.
    Raises:
        DataError: no batch came, or the metric gives NaN; or what was looked for.
    """
    device = device_of(model)
    with in_eval_mode(model), whole_float32(device):
        run = partial(call, model)
        return mean_error(run, batches, metric, device, bounded=bounded, lenient=not bounded)


def mean_error(
    run: Callable[[Any], Any],
    batches: Iterable[Any],
    metric: Metric = top1_error,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    *,
    bounded: bool = False,
    lenient: bool = False,
) -> float:
    """`measure_error` of whatever gives outputs for inputs: a file's session, say.

    Args:
        run: inputs on `device` -> output.
        lenient: where the metric has no value, it is an error of 1.
    """
    precise = torch.float32 if device.type == "mps" else torch.float64  # all that Apple's GPUs have
    total, beyond, unfit = torch.zeros(3, dtype=precise, device=device)
    count = 0
    for batch in batches:
        inputs, target = to_device(batch[0], device), to_device(batch[1], device)
        errors = metric(run(inputs), target)
        if lenient:
            errors = torch.where(errors.isnan(), 1, errors)
        total += errors.to(precise).sum()
        beyond += ((errors < -ROUNDING) | (errors > 1 + ROUNDING)).sum()
        if bounded:
            unfit += _count_unfit(inputs)
        count += errors.numel()
    if count == 0:
        raise DataError("evaluation", "the set is empty: no batch came.")
    if unfit:
        raise DataError("evaluation", f"{int(unfit)} of {count} examples hold NaN or infinite values.")
    error = 100.0 * float(total) / count
    if not math.isfinite(error):
        raise DataError(
            "evaluation", f"the metric's mean over {count} values is {error:g}.", "Look for NaN in the data."
        )
    if bounded and beyond:
        raise DataError(
            "evaluation", f"the metric gives errors below 0 or above 1 for {int(beyond)} of {count} examples."
        )
    return error
