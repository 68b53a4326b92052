"""Distillation: a network follows the outputs of its teacher, the dense original, beside the labels."""

import copy
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from vbdcompress.compilation import compile_
from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches
from vbdcompress.data.batches import examples_at_once
from vbdcompress.evaluation import Loss, logits_of, one_head
from vbdcompress.inputs import Inputs, in_eval_mode
from vbdcompress.layout import lay_out_fast_
from vbdcompress.modes import evaluated
from vbdcompress.opening import open_layers_

# Of a teacher's outputs, where the inputs are fewer
KEPT_BYTES = 64 << 20


class DistillationLoss(nn.Module):
    """share * KL(teacher || network), both softened by T, + (1 - share) * loss to the labels.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, without their factor
    T^2: so it is the NLL of softened labels, less their entropy, in nats, and the beta that balances
    it against the posterior's KL is that of hard labels (measured at T = 2: the same sparsity).

    Args:
        loss: (output, labels) -> scalar mean NLL in nats.
        share: in [0, 1].
        temperature: what both outputs are divided by.
    """

    def __init__(self, loss: Loss, share: float, temperature: float) -> None:
        super().__init__()
        self.loss, self.share, self.temperature = loss, share, temperature

    def forward(self, output: Any, target: tuple[Any, Any]) -> Tensor:
        """Scalar, nats per example; output [batch, classes, ...], or with such `logits`; target (labels,
        teacher's output).

        Raises DataError where there are no logits.
        """
        labels, taught = target
        network = F.log_softmax(one_head(output) / self.temperature, 1)
        teacher = F.log_softmax(one_head(taught).to(network.dtype) / self.temperature, 1)
        divergence = F.kl_div(network, teacher, reduction="none", log_target=True).sum(1).mean()
        distilled = self.share * divergence
        return distilled if self.share == 1 else distilled + (1 - self.share) * self.loss(output, labels)


@torch.no_grad()
def outputs_of(teacher: nn.Module, inputs: Tensor) -> Tensor:
    """The teacher's outputs for a whole set in memory, [n, classes, ...]."""
    with in_eval_mode(teacher):
        return torch.cat([logits_of(teacher(part)) for part in torch.split(inputs, examples_at_once(inputs))])


def teach(
    teacher: nn.Module | None,
    loss: Loss,
    batches: Any,
    config: FitConfig,
    fabric: Fabric,
    *,
    shown: Inputs | None = None,
    opened: Collection[str] = (),
) -> tuple[Loss, Any, nn.Module | None]:
    """Loss and batches with the teacher's outputs in them; the teacher too where it must be asked anew.

    It is asked once for each way in which an input may be shown, where these are fewer than the
    epochs and what is kept is no more than the inputs; else, and for a loader's inputs, at every step.

    Args:
        shown: some inputs, to find out which order in memory its code takes; None leaves it as it is.
        opened: names of the attention and the like that the network calls by its layers: so does the teacher.
    """
    if teacher is None or config.distill_share == 0:
        return loss, batches, None
    teacher = evaluated(copy.deepcopy(teacher).to(fabric.device))
    open_layers_(teacher, opened)
    if shown is not None:
        lay_out_fast_(teacher, shown)
    distilled = DistillationLoss(loss, config.distill_share, config.temperature)
    views = batches.views if isinstance(batches, TensorBatches) else None
    if views is not None and views <= max(1, config.epochs):
        with fabric.autocast():
            first = outputs_of(teacher, batches.view(0))
            if views * first.nbytes <= max(KEPT_BYTES, batches.inputs.nbytes):
                outputs = first.new_empty(views, *first.shape)
                outputs[0] = first
                for number in range(1, views):
                    outputs[number] = outputs_of(teacher, batches.view(number))
                return distilled, batches.taught(outputs), None
    compile_(teacher, config)
    return distilled, batches, teacher
