"""What would end a run after its fit, looked for before it: there it costs the user nothing yet."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from vbdcompress.compare import flatten_output, relative_difference
from vbdcompress.config import RunConfig
from vbdcompress.errors import ConfigError, ConvertError
from vbdcompress.evaluation import Judge, cross_entropy, device_of, to_device, top1_error
from vbdcompress.exporting.onnx_file import TOLERANCE
from vbdcompress.exporting.preprocessing import check_pixels
from vbdcompress.inputs import Inputs, batch_size, call, example_shape, first, in_eval_mode, shapes_of
from vbdcompress.judging import check_classes, check_labels, check_logits, try_loss, try_metric
from vbdcompress.originals import NO_NOISE, check_storable
from vbdcompress.sources import Sources


def check_run(
    model: nn.Module,
    samples: Inputs,
    target: Any,
    sources: Sources,
    config: RunConfig,
    judge: Judge,
    others: Sequence[Inputs] = (),
) -> None:
    """Raise what would end the run after its fit, or make its figures wrong.

    Args:
        samples, target: of the first training batch.
        others: inputs of other shapes that the first batches hold.
    """
    outputs = _check_network(model, samples)
    _check_batch_first(model, samples, outputs)
    shape, found = tuple(sources.input.shape), [example_shape(each) for each in (samples, *others)]
    if shape not in found:
        shapes = ", ".join(str(list(each)) for each in found)
        raise ConfigError(
            "input",
            f"InputSpec says examples of shape {list(shape)}, the loader's are {shapes}.",
            "An empty shape takes the loader's: InputSpec((), mean, std)",
        )
    for name, values in (("mean", sources.input.mean), ("std", sources.input.std)):
        if shape and len(values) not in (0, 1, shape[0]):
            raise ConfigError(
                "input",
                f"InputSpec has {len(values)} numbers in {name}, the examples have {shape[0]} channels.",
                "One for each channel, one for all, or none.",
            )
    told = sources.input.mean and sources.input.std
    if config.embed_preprocessing and not (told and isinstance(samples, torch.Tensor)):
        raise ConfigError(
            "embed_preprocessing",
            "the inputs are several, or nobody says by which mean and std they are normalised.",
            "input=InputSpec(shape, mean, std)",
        )
    if config.embed_preprocessing:
        for batches in (sources.validation, sources.test):  # training may add noise to its pixels
            if batches is not None:
                for given, _ in islice(batches, 1):
                    check_pixels(given, sources.input)
    check_storable(model, samples, int8=config.int8, packed=config.bits != "32" or bool(config.pack))
    by_label = judge.loss is cross_entropy
    if by_label or judge.follows(config):
        output = check_logits(model, samples, by_label=by_label)
        if by_label:
            check_labels(output, target, sources, judge.metric)
    if by_label and config.distill_share < 1:
        try_loss(model, sources.train, judge.loss)
    _check_measured(model, samples, sources, judge)


def _check_measured(model: nn.Module, samples: Inputs, sources: Sources, judge: Judge) -> None:
    """Raise what measuring validation and test data would."""
    for part, batches in (("validation", sources.validation), ("test", sources.test)):
        if batches is not None:
            try_metric(model, batches, part, judge.metric)
    if judge.metric is top1_error:
        check_classes(model, samples, sources)


def _check_network(model: nn.Module, samples: Inputs) -> list[torch.Tensor]:
    """The outputs. Raises ConvertError where no file could hold what the network does."""
    outputs, again = outputs_of(model, samples), outputs_of(model, samples)
    difference = relative_difference(outputs, again)
    if outputs and difference > TOLERANCE:
        raise ConvertError(
            "convert",
            f"in eval mode, outputs for the same inputs differ by {difference:.1g} from call to call.",
            NO_NOISE,
        )
    return outputs


def _check_batch_first(model: nn.Module, samples: Inputs, outputs: Sequence[torch.Tensor]) -> None:
    """Raise ConvertError where it is another dimension of the inputs that the outputs' size follows."""
    given, few = batch_size(samples), first(samples, 2)
    sizes = [len(output) for output in outputs if output.dim()]
    others = {size for shape in shapes_of(samples) for size in shape[1:]}
    if not sizes or given <= 2 or not set(sizes) <= others:
        return
    if sizes == [len(output) for output in outputs_of(model, few) if output.dim()]:
        raise ConvertError(
            "convert",
            f"the network's outputs have {', '.join(map(str, sizes))} in their first dimension, whether its "
            f"inputs have {given} or 2 in theirs: that must be the batch.",
            "Batch first, in inputs and outputs: nn.LSTM(..., batch_first=True), or transpose in forward.",
        )


def outputs_of(model: nn.Module, samples: Inputs) -> list[torch.Tensor]:
    """All tensors in what the network gives in eval mode, on the CPU."""
    with in_eval_mode(model), torch.no_grad():
        outputs = flatten_output(call(model, to_device(samples, device_of(model))))
    return [output.cpu() for output in outputs]
