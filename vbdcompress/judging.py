"""Whether loss and metric can judge what a network gives, tried before a fit depends on it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vbdcompress.data import TensorBatches
from vbdcompress.errors import DataError
from vbdcompress.evaluation import ROUNDING, Loss, Metric, device_of, logits_of, to_device, top1_error
from vbdcompress.inputs import Inputs, batch_size, call, first, in_eval_mode, shapes_of
from vbdcompress.sources import Sources, describe_batch, first_batch

# Of a sum of probabilities, in float32 or coarser
PROBABILITY = 1e-3
# The label that cross entropy passes over
IGNORED = -100
TRIED = 32
# What users' own raise on targets that they were not made for
JUDGE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


def try_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> None:
    """Take the loss of the first training batch as the fit will. Raises DataError where that fails."""
    _try_on(model, batches, "training", loss, lambda *_: None)


def try_metric(model: nn.Module, batches: Iterable[Any], part: str, metric: Metric) -> None:
    """Measure the first batch of a part as the run will. Raises DataError where that fails.

    Args:
        part: "validation" or "test".
    """

    def check(output: Any, target: Any, errors: Any) -> None:
        output = logits_of(output)
        if metric is top1_error and (target.is_floating_point() or target.shape != errors.shape):
            raise ValueError(f"classes are whole numbers of shape {list(output.argmax(1).shape)}")
        if metric is top1_error and not bool(((target >= 0) & (target < output.shape[1])).all()):
            found = f"{int(target.min())} to {int(target.max())}"
            raise ValueError(f"classes are from 0 to {output.shape[1] - 1}, found are {found}")
        if not isinstance(errors, Tensor) or not errors.dim():
            raise ValueError(f"it gives {_describe_target(errors)}, allowed is an error for each example")
        if bool(errors.isnan().any()):
            raise ValueError("it gives NaN for an example, allowed are 0 to 1")
        if not bool(((errors >= -ROUNDING) & (errors <= 1 + ROUNDING)).all()):
            low, high = float(errors.min()), float(errors.max())
            raise ValueError(f"it gives errors from {low:g} to {high:g}, allowed are 0 to 1")

    _try_on(model, batches, part, metric, check)


@torch.no_grad()
def check_classes(model: nn.Module, samples: Inputs, sources: Sources) -> None:
    """Raise DataError for labels of no class in any batch that is measured: each would count as an error.

    Args:
        samples: some inputs, to see how many classes the network knows.
    """
    with in_eval_mode(model):
        classes = logits_of(call(model, to_device(first(samples, 2), device_of(model)))).shape[1]
    for part, batches in (("validation", sources.validation), ("test", sources.test)):
        if batches is None:
            continue
        targets = (
            [batches.labels] if isinstance(batches, TensorBatches) else (target for _, target in batches)
        )
        unknown = count = 0
        for target in targets:
            unknown += int(((target < 0) | (target >= classes)).sum())
            count += target.numel()
        if unknown:
            raise DataError(
                f"the {part} loader",
                f"{unknown} of {count} labels are of no class: the network knows 0 to {classes - 1}.",
                "Examples without a class: leave them out, or pass a metric of your own.",
            )


def _try_on(
    model: nn.Module,
    batches: Iterable[Any],
    part: str,
    judge: Loss | Metric,
    check: Callable[[Any, Any, Any], None],
) -> None:
    """Judge the first batch of a part; `check` raises ValueError on what may not come of it."""
    inputs, target = first_batch(batches, f"the {part} loader")
    given, wanted = to_device(_some_of(inputs, target), device_of(model))
    kind = getattr(judge, "__name__", type(judge).__name__)
    advice = "Pass your own: compress(..., loss=, metric=); a metric gives each example's error, 0 to 1."
    with in_eval_mode(model), torch.no_grad():
        try:
            output = call(model, given)
        except JUDGE_ERRORS as error:
            shapes = ", ".join(str(shape) for shape in shapes_of(inputs))
            raise DataError(
                f"the {part} loader", f"yields inputs of {shapes}, on which the network fails: {error}"
            ) from error
        try:
            check(output, wanted, judge(output, wanted))
        except JUDGE_ERRORS as error:
            raise DataError(
                f"the {part} loader", f"yields targets of {_describe_target(target)}; {kind}: {error}", advice
            ) from error


def _some_of(inputs: Inputs, target: Any) -> tuple[Inputs, Any]:
    """TRIED examples of a batch: the network is on the CPU yet, where a whole one may take minutes."""
    size, parts = batch_size(inputs), tree_leaves(target)
    if size <= TRIED or not all(isinstance(part, Tensor) and part.shape[:1] == (size,) for part in parts):
        return inputs, target
    return first(inputs, TRIED), first(target, TRIED)


def _describe_target(target: Any) -> str:
    return _shape_of(target) if isinstance(target, Tensor) else describe_batch(target)


def check_logits(model: nn.Module, samples: Inputs, *, by_label: bool) -> Tensor:
    """The network's output on the samples, [batch, classes] logits or [batch, classes, ...].

    Args:
        by_label: for cross entropy; else for distillation alone, where there may be more dimensions.
    Raises:
        DataError: it is no logits: another shape, one column, or probabilities already.
    """
    with in_eval_mode(model), torch.no_grad():
        output = logits_of(call(model, samples))
    what = "cross entropy" if by_label else "distillation"
    advice = "From Python, pass your own: compress(..., loss=, metric=, distill=0)"
    if not isinstance(output, Tensor) or output.dim() < 2 or (by_label and output.dim() > 2):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError("network", f"gives {found}, {what} needs logits [batch, classes].", advice)
    if output.shape[1] == 1:
        told = f"gives one number for an example, {what} needs a logit for each of two classes or more."
        raise DataError("network", told, advice)
    sums = output.double().sum(1)
    if bool((output >= 0).all()) and bool((sums - 1).abs().max() < PROBABILITY):
        raise DataError(
            "network",
            f"gives probabilities (each example's outputs sum to 1), {what} needs logits: a softmax of a "
            "softmax forgets what was learned.",
            "Leave the last softmax out of the network, and apply it where the outputs are read.",
        )
    return output


def check_labels(output: Tensor, target: Any, sources: Sources, metric: Metric) -> None:
    """Raise DataError where cross entropy can't be: of `target`, or of a set that is in memory.

    Args:
        output: [batch, classes], the network's.
        metric: one of the user's own may pass over labels of -100, as cross entropy does.
    """
    if isinstance(target, Tensor) and target.is_floating_point():
        if target.dim() != 2 or target.shape[1] != output.shape[1]:
            raise DataError(
                "loader",
                f"yields targets of {_shape_of(target)}, cross entropy needs classes [batch] (whole numbers) "
                f"or their probabilities [batch, {output.shape[1]}].",
                "Pass a loss of your own: compress(..., loss=, metric=)",
            )
        off = (target.double().sum(1) - 1).abs() > PROBABILITY
        if bool((target < 0).any()) or bool(off.any()):
            raise DataError(
                "loader",
                f"yields targets of {_shape_of(target)} that are no probabilities: they are below 0, or do "
                "not sum to 1; cross entropy needs classes or their probabilities.",
                "Numbers to predict: compress(..., loss=F.mse_loss, metric=)",
            )
        return
    parts = {"training": sources.train, "validation": sources.validation, "test": sources.test}
    labelled = {part: each.labels for part, each in parts.items() if isinstance(each, TensorBatches)}
    for part, given in ({"training": target} | labelled).items():
        if not isinstance(given, Tensor) or not given.numel():
            continue
        skips = part == "training" or metric is not top1_error
        labels = given.where(given != IGNORED, 0) if skips else given
        name = sources.record.name
        where = f"the {part} loader" if name is None else f"data set '{name}', {part} part"
        if int(labels.max()) >= output.shape[1]:
            raise DataError(
                where,
                f"has labels up to {int(labels.max())}, the network has {output.shape[1]} outputs.",
                "Labels count from 0; the data must be of the classes that it was trained on.",
            )
        if int(labels.min()) < 0:
            raise DataError(
                where,
                f"has labels from {int(labels.min())}, allowed are 0 to {output.shape[1] - 1}.",
                "Examples without a class: leave them out, or pass a loss and a metric of your own.",
            )


def _shape_of(target: Tensor) -> str:
    return f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)}"
