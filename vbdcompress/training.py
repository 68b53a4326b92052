"""One epoch of a fit: the steps, their rates and seeds, and who is told of them."""

import math
import random
import time
from collections.abc import Iterator, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from vbdcompress.compilation import begin_step
from vbdcompress.config import FitConfig
from vbdcompress.data.loaders import seed_generators, set_epoch
from vbdcompress.errors import FitError
from vbdcompress.evaluation import to_device
from vbdcompress.inputs import batch_size, call, named_batch_of_one
from vbdcompress.norms import train_
from vbdcompress.optimization import default_beta
from vbdcompress.records import EpochRow
from vbdcompress.vbd.elbo import beta_at
from vbdcompress.vbd.posterior import find_posteriors

# How the title of a fit of a slim network begins
FINE_TUNING = "Fine-tuning"


class Listener(Protocol):
    """Is told how the fit goes on; only in the main process."""

    def on_start(self, title: str, epochs: int) -> None:
        """Before the first epoch of a fit; one run may have several."""

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """After a step: both counted from 1; examples in it over all processes."""

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        """After an epoch and its validation."""


@runtime_checkable
class CutListener(Listener, Protocol):
    """Is told how the choice goes on, too."""

    def on_cut(self, done: int, cuts: int) -> None:
        """Before a fitted network is cut once more and measured, and after the last time: done of cuts."""


class EpochRunner:
    """Trains a network epoch by epoch; holds what stays the same over the epochs of one fit.

    Args:
        module, optimizer: as Fabric set them up; the module gives ELBO terms.
        batches: on the device, this process's share.
        teacher: asked at every step; None where the batches hold its outputs, or there is none.
        listener: told of each step; None in all but the main process.
        keep_zeros: what is 0 stays 0, but for biases of nothing else, which may yet learn.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: FitConfig,
        module: Any,
        optimizer: Any,
        batches: Any,
        teacher: nn.Module | None,
        listener: Listener | None,
        *,
        keep_zeros: bool,
    ) -> None:
        self.fabric, self.config = fabric, config
        self.module, self.optimizer, self.batches = module, optimizer, batches
        self.teacher, self.listener = teacher, listener
        beta = default_beta(module) if config.beta is None else config.beta
        self.full_beta = beta if find_posteriors(module) else 0.0
        self.warmup = min(config.warmup_epochs, config.epochs // 2)
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        masks = [(tensor, tensor != 0) for tensor in module.parameters()] if keep_zeros else []
        cut = [(tensor, mask) for tensor, mask in masks if tensor.dim() >= 2 or bool(mask.any())]
        self.kept = [(tensor, mask) for tensor, mask in cut if not bool(mask.all())]

    def beta(self, epoch: int) -> float:
        """Weight of the KL in an epoch counted from 0; 0 where nothing has a posterior."""
        return beta_at(epoch, self.full_beta, self.warmup)

    def rate(self, epoch: int) -> float:
        """Factor of the learning rates in an epoch counted from 0."""
        done = epoch / max(1, self.config.epochs)
        factors = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return factors[self.config.schedule]

    def epoch(self, epoch: int) -> tuple[float, float, float, int]:
        """One pass over the training set: mean NLL and KL in nats per example, seconds, and examples."""
        fabric, config = self.fabric, self.config
        # Of (seed, epoch, rank) alone, so that a resumed fit draws what an unbroken one would
        seed = config.seed * 1_000_003 + epoch
        own = seed * 4096 + fabric.global_rank
        torch.manual_seed(own)
        random.seed(own)  # these two for data sets that augment by them
        np.random.seed(own % 2**32)
        # What workers draw is each process's own; that the order is one for all SharedSampler sees to
        seed_generators(self.batches, own if fabric.global_rank else seed)
        set_epoch(self.batches, epoch)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * self.rate(epoch)
        beta = torch.tensor(self.beta(epoch), device=fabric.device)
        sums = torch.zeros(2, device=fabric.device)
        train_(self.module)
        steps = _count_steps(self.batches)
        count, seen, started = 0, 0, time.perf_counter()
        for inputs, target, examples in self.shares():
            sums += examples * self.step(inputs, target, beta)
            count, seen = count + 1, seen + examples * fabric.world_size
            if self.listener is not None:
                self.listener.on_step(epoch + 1, count, steps, examples * fabric.world_size)
        if count == 0:
            raise FitError(f"fit: epoch {epoch + 1}", "the loader gave no batch.")
        mean = sums * fabric.world_size / seen  # of this process's examples; the last batch may be smaller
        if fabric.world_size > 1:
            mean = fabric.all_reduce(mean, reduce_op="mean")  # type: ignore[assignment]
        nll, kl = mean.tolist()
        return nll, kl, time.perf_counter() - started, seen

    def shares(self) -> Iterator[tuple[Any, Any, int]]:
        """This process's inputs, targets and number of examples, on its device, batch by batch."""
        device = self.fabric.device
        for batch in self.batches:
            begin_step(self.config)
            inputs, target = to_device(batch[0], device), to_device(batch[1], device)
            if self.teacher is not None:
                with torch.no_grad(), self.fabric.autocast():
                    target = (target, call(self.teacher, inputs))
            yield inputs, target, batch_size(inputs)

    def step(self, inputs: Any, target: Any, beta: Tensor) -> Tensor:
        """One update; returns [2], detached NLL and KL."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with named_batch_of_one("fit"):
                terms = self.module(inputs, target, beta)
        except IndexError as error:
            if not str(error).startswith("Target"):  # torch's cross entropy on the CPU: no logit for a label
                raise
            raise FitError("fit", f"the loss refused a batch: {error}", "Labels count from 0.") from error
        self.fabric.backward(terms.objective)
        if self.config.clip_norm is not None:
            self.fabric.clip_gradients(
                self.module, self.optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        with torch.no_grad():
            for tensor, mask in self.kept:
                tensor.mul_(mask)
        return torch.stack((terms.nll.detach(), terms.kl.detach()))


def _count_steps(batches: Any) -> int | None:
    """Batches in an epoch; None where that is not known. A DataLoader always has a __len__ that may raise."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None
