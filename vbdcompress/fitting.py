"""fit: train a network on the ELBO; without a posterior in it, on the plain loss."""

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vbdcompress.checkpoints import FitCheckpoint, FitState
from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches, count_examples
from vbdcompress.data.loaders import check_repeatable
from vbdcompress.devices import start_fabric
from vbdcompress.distillation import DistillationLoss, outputs_of
from vbdcompress.errors import FitError
from vbdcompress.evaluation import Loss, Metric, cross_entropy, measure_error, to_device, top1_error
from vbdcompress.optimization import default_beta, make_optimizer
from vbdcompress.records import EpochRow
from vbdcompress.vbd.elbo import ELBO, beta_at
from vbdcompress.vbd.posterior import KEEP_ALL, find_posteriors, set_threshold_


class Listener(Protocol):
    """Is told how the fit goes on; only in the main process."""

    def on_start(self, title: str, epochs: int) -> None:
        """Before the first epoch of a fit; one run may have several."""

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """After a step: both counted from 1; examples in it over all processes."""

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        """After an epoch and its validation."""


@dataclass(frozen=True)
class FitResult:
    """The fitted network (the same object, trained in place), its log; whether this is the main process."""

    model: nn.Module
    epochs: tuple[EpochRow, ...]
    is_main: bool


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    config: FitConfig | None = None,
    *,
    validation: Iterable[Any] | None = None,
    loss: Loss = cross_entropy,
    metric: Metric = top1_error,
    threshold: float = KEEP_ALL,
    teacher: nn.Module | None = None,
    num_data: int | None = None,
    keep_zeros: bool = False,
    checkpoint: FitCheckpoint | None = None,
    listener: Listener | None = None,
) -> FitResult:
    """Minimise mean NLL + beta * KL / num_data by Adam, in place.

    Args:
        model: a converted network (`convert(...).model`), or a plain one: then KL is 0.
        loader: yields (input, target) batches, once an epoch.
        config: rates, epochs, prior, device, precision, processes.
        validation: the error on it is measured after each epoch, masked at `threshold`.
        loss: (output, target) -> scalar mean NLL in nats.
        metric: (output, target) -> [batch] errors in [0, 1].
        threshold: of log_alpha, for the epoch log's error and sparsity only.
        teacher: whose outputs the network follows beside the labels, as `config.distill` says (all
            of the loss where it says nothing): the dense original. None: the labels alone.
        num_data: training examples an epoch over all processes; None counts them.
        keep_zeros: weights (tensors of 2 or more dimensions) that are 0 stay 0.
        checkpoint: where the state is kept; with resume, a fit that was cut off goes on as if
            it had not been.
        listener: told of steps and epochs.
    Raises:
        FitError: the loss turned NaN or infinite, or a checkpoint is of another fit.
        DataError: the loader is empty, or gives its batches only once.
    """
    config = config or FitConfig()
    fabric = start_fabric(config)
    for batches in (loader, validation):
        check_repeatable(batches)
    with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
        total = num_data or count_examples(loader)
        placed = _place(loader, fabric)
        loss, placed, absent = _teach(teacher, loss, placed, config, fabric.device)
        _lay_out_(model, torch.channels_last)
        elbo = ELBO(model, loss, total, config.prior)
        optimizer = make_optimizer(model, config)
        dtype = next(model.parameters()).dtype
        step_module, step_optimizer = fabric.setup(elbo, optimizer)
        run = _Run(fabric, config, step_module, step_optimizer, placed, absent, keep_zeros=keep_zeros)
        state = FitState(fabric, config, elbo, optimizer)
        rows = state.restore(checkpoint)
        if listener is not None and fabric.is_global_zero:
            listener.on_start(_title(model, len(rows), keep_zeros), config.epochs)
        saved, time_saved, cost = len(rows), time.monotonic(), 0.0
        for epoch in range(len(rows), config.epochs):
            nll, kl, seconds = run.epoch(epoch, listener)
            _check_finite(epoch, nll, kl, model, saved)
            set_threshold_(model, threshold)
            error = None
            if validation is not None:
                error = measure_error(model, _cast(validation, fabric, config), metric)
            row = EpochRow(
                epoch + 1,
                nll,
                kl,
                beta_at(epoch, run.beta, run.warmup),
                error,
                _sparsity(model, threshold),
                config.lr * run.rate(epoch),
                seconds,
                total / seconds,
            )
            rows.append(row)
            last = epoch + 1 == config.epochs
            if checkpoint and (last or checkpoint.due(time.monotonic() - time_saved, cost)):
                started = time.monotonic()
                state.save(checkpoint, rows)
                saved, time_saved = len(rows), time.monotonic()
                cost = time_saved - started
            if listener is not None and fabric.is_global_zero:
                listener.on_epoch(row, config.epochs)
    if config.precision == "64-true":
        model.to(dtype)
    _lay_out_(model, torch.contiguous_format)
    model.eval()
    return FitResult(model, tuple(rows), fabric.is_global_zero)


class _Run:
    """What stays the same over the epochs of one fit."""

    def __init__(
        self,
        fabric: Fabric,
        config: FitConfig,
        module: Any,
        optimizer: Any,
        batches: Any,
        teacher: nn.Module | None,
        *,
        keep_zeros: bool,
    ) -> None:
        self.fabric, self.config = fabric, config
        self.module, self.optimizer, self.batches = module, optimizer, batches
        self.teacher = teacher
        self.beta = default_beta(module) if config.beta is None else config.beta
        self.warmup = min(config.warmup_epochs, config.epochs // 2)
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        weights = [weight for weight in module.parameters() if weight.dim() >= 2] if keep_zeros else []
        self.kept = [(weight, weight != 0) for weight in weights if bool((weight == 0).any())]

    def rate(self, epoch: int) -> float:
        """Factor of the learning rates in an epoch counted from 0."""
        done = epoch / max(1, self.config.epochs)
        factors = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return factors[self.config.schedule]

    def epoch(self, epoch: int, listener: Listener | None) -> tuple[float, float, float]:
        """One pass over the training set: mean NLL and KL in nats per example, and seconds."""
        fabric, config = self.fabric, self.config
        # Of (seed, epoch, rank) alone, so that a resumed fit draws what an unbroken one would
        torch.manual_seed((config.seed * 1_000_003 + epoch) * 4096 + fabric.global_rank)
        _set_epoch(self.batches, epoch)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * self.rate(epoch)
        beta = torch.tensor(beta_at(epoch, self.beta, self.warmup), device=fabric.device)
        sums = torch.zeros(2, device=fabric.device)
        self.module.train()
        steps = _count_steps(self.batches)
        count, started = 0, time.perf_counter()
        for inputs, target, examples in self.shares():
            sums += self.step(inputs, target, beta)
            count += 1
            if listener is not None and fabric.is_global_zero:
                listener.on_step(epoch + 1, count, steps, examples * fabric.world_size)
        if count == 0:
            raise FitError(f"fit: epoch {epoch + 1}", "the loader gave no batch.")
        mean = sums / count
        if fabric.world_size > 1:
            mean = fabric.all_reduce(mean, reduce_op="mean")  # type: ignore[assignment]
        nll, kl = mean.tolist()
        return nll, kl, time.perf_counter() - started

    def shares(self) -> Iterator[tuple[Any, Any, int]]:
        """This process's inputs, targets and number of examples, on its device, batch by batch."""
        device = self.fabric.device
        for batch in self.batches:
            inputs, target = to_device(batch[0], device), to_device(batch[1], device)
            if self.teacher is not None:
                with torch.no_grad(), self.fabric.autocast():
                    target = (target, self.teacher(inputs))
            yield inputs, target, len(target[0] if isinstance(target, tuple) else target)

    def step(self, inputs: Any, target: Any, beta: Tensor) -> Tensor:
        """One update; returns [2], detached NLL and KL."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
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
            for weight, kept in self.kept:
                weight.mul_(kept)
        return torch.stack((terms.nll.detach(), terms.kl.detach()))


def _set_epoch(batches: Any, epoch: int) -> None:
    """Tell whatever decides the order of the examples which epoch it is."""
    parts: list[Any] = [batches]
    if isinstance(batches, DataLoader):
        parts = [batches.sampler, batches.batch_sampler]
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _count_steps(batches: Any) -> int | None:
    """Batches in an epoch; None where that is not known. A DataLoader always has a __len__ that may raise."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def _check_finite(epoch: int, nll: float, kl: float, model: nn.Module, saved: int) -> None:
    """The last step's gradient may spoil the parameters after its loss was still finite.

    Args:
        saved: number of epochs after which the last checkpoint was written; 0 where there is none.
    """
    finite = torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()
    if math.isfinite(nll) and math.isfinite(kl) and bool(finite):
        return
    what = f"the loss or the parameters are not finite (NLL {nll:g}, KL {kl:g})"
    raise FitError(
        f"fit: epoch {epoch + 1}",
        what + (f"; the checkpoint after epoch {saved} is kept." if saved else "."),
        "Lower --lr, set --clip-norm 1, or look for NaN in the data.",
    )


def _cast(batches: Iterable[Any], fabric: Fabric, config: FitConfig) -> Iterator[Any]:
    """In double precision the network takes double inputs; Fabric sees to it in training only."""
    dtype = torch.float64 if config.precision == "64-true" else None
    for inputs, target in batches:
        yield to_device(inputs, fabric.device, dtype), target


def _place(loader: Iterable[Any], fabric: Fabric) -> Any:
    """The loader's share of this process: tensors move to the device, a DataLoader gets its sampler."""
    if isinstance(loader, TensorBatches):
        if loader.batch_size < fabric.world_size:
            raise FitError("fit", f"a batch of {loader.batch_size} can't be shared by {fabric.world_size}.")
        return loader.on(fabric.device, fabric.global_rank, fabric.world_size)
    if fabric.world_size == 1:
        return loader
    if isinstance(loader, DataLoader):
        # Unwrapped: Fabric's wrapper calls set_epoch with a count that is 0 again in a resumed fit
        return fabric.setup_dataloaders(loader, move_to_device=False)._dataloader  # type: ignore[union-attr]
    raise FitError(
        "fit",
        f"a {type(loader).__name__} can't be shared by {fabric.world_size} processes.",
        "Use a torch DataLoader.",
    )


def _teach(
    teacher: nn.Module | None, loss: Loss, batches: Any, config: FitConfig, device: torch.device
) -> tuple[Loss, Any, nn.Module | None]:
    """Loss and batches with the teacher's outputs in them; the teacher too where it must be asked anew.

    Inputs that never change are shown to it once; augmented ones, and a loader's, at every step.
    """
    share = 1.0 if config.distill is None else config.distill
    if teacher is None or share == 0:
        return loss, batches, None
    teacher = copy.deepcopy(teacher).to(device).eval()
    distilled = DistillationLoss(loss, share, config.temperature)
    if isinstance(batches, TensorBatches) and batches.augment == "none":
        return distilled, batches.taught(outputs_of(teacher, batches.inputs)), None
    return distilled, batches, teacher


def _lay_out_(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Order of the weights of 2-d convolutions in memory; channels last is what they run fastest in."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _title(model: nn.Module, done: int, keep_zeros: bool) -> str:
    posteriors = find_posteriors(model)
    count = sum(posterior.theta.numel() for posterior in posteriors)
    what = "weights" if any(posterior.kind == "weight" for posterior in posteriors) else "channel gates"
    title = (
        f"Fitting the posterior of {count:,} {what}"
        if posteriors
        else "Fine-tuning"
        if keep_zeros
        else "Training"
    )
    return f"{title}, going on after epoch {done}" if done else title


def _sparsity(model: nn.Module, threshold: float) -> float | None:
    posteriors = find_posteriors(model)
    if not posteriors:
        return None
    with torch.no_grad():
        removed = sum(int((p.log_alpha() >= threshold).sum()) for p in posteriors)
    return removed / sum(p.theta.numel() for p in posteriors)
