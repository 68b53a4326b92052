"""fit: train a network on the ELBO; without a posterior in it, on the plain loss."""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from vbdcompress.checkpoints import FitCheckpoint, FitState
from vbdcompress.compare import forget_calls_
from vbdcompress.compilation import compile_, compiled_code
from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches, Unpacked, count_examples, on_device
from vbdcompress.data.loaders import check_repeatable, forked_generators
from vbdcompress.data.sharing import share
from vbdcompress.devices import check_same_start, named_loss_of_a_process, share_buffers_, start_fabric
from vbdcompress.distillation import teach
from vbdcompress.dropout import scaled_dropout
from vbdcompress.errors import ConfigError, FitError
from vbdcompress.evaluation import (
    Loss,
    Metric,
    cross_entropy,
    measure_error,
    to_device,
    top1_error,
    with_gradients,
)
from vbdcompress.inputs import Inputs, check_network
from vbdcompress.layout import has_layout, lay_out_, lay_out_fast_
from vbdcompress.opening import Opened
from vbdcompress.optimization import make_optimizer
from vbdcompress.records import EpochRow
from vbdcompress.training import FINE_TUNING, EpochRunner, Listener
from vbdcompress.vbd.elbo import ELBO
from vbdcompress.vbd.posterior import KEEP_ALL, find_posteriors, set_threshold_


@dataclass(frozen=True)
class FitResult:
    """What a fit gives.

    Attributes:
        model: the fitted network, the same object, trained in place.
        epochs: the log.
        is_main: whether this is the main process.
        restored: how many of the epochs a checkpoint held.
    """

    model: nn.Module
    epochs: tuple[EpochRow, ...]
    is_main: bool
    restored: int = 0


@with_gradients()
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
    """Minimise mean NLL + beta * KL / num_data by Adam, or by gradient descent as `config` says, in place.

    Args:
        model: a converted network (`convert(...).model`), or a plain one: then KL is 0.
        loader: yields (inputs, target) batches, once an epoch; inputs as `compress` takes them, the batch
            first (else say `num_data`).
        config: rates, epochs, prior, device, precision, processes.
        validation: the error on it is measured after each epoch, masked at `threshold`.
        loss: (output, target) -> scalar mean NLL in nats. A module is copied, and stays in its own mode.
        metric: (output, target) -> [batch] errors in [0, 1].
        threshold: of log_alpha, for the epoch log's error and sparsity only.
        teacher: whose outputs the network follows beside the labels, as `config.distill` says (all
            of the loss where it says nothing): the dense original. None: the labels alone.
        num_data: training examples an epoch over all processes; None counts them.
        keep_zeros: what is 0 stays 0, but for biases of nothing else, which may yet learn.
        checkpoint: where the state is kept; with resume, a fit that was cut off goes on as if
            it had not been.
        listener: told of steps and epochs.
    Raises:
        FitError: the loss turned NaN or infinite, a checkpoint is of another fit, torch.compile was
            asked for and fails, or one of several processes died.
        DataError: the loader is empty, or gives its batches only once.
    """
    config = _checked(model, config)
    fabric = start_fabric(config)
    for batches in (loader, validation):
        check_repeatable(batches)
    with (
        forked_generators([fabric.device] if fabric.device.type == "cuda" else []),
        compiled_code(config),
        named_loss_of_a_process(fabric),
        scaled_dropout(model, _dropout_share(config, teacher)),
    ):
        total = num_data or count_examples(loader)
        placed, validation = _place(loader, fabric, config.seed), on_device(validation, fabric.device)
        shown = _first_inputs(placed) if has_layout(model) else None
        if isinstance(loss, nn.Module):
            loss = copy.deepcopy(loss)  # it is moved and cast with the network
        opened = [name for name, module in model.named_modules() if isinstance(module, Opened)]
        loss, placed, absent = teach(teacher, loss, placed, config, fabric, shown=shown, opened=opened)
        if shown is not None:
            lay_out_fast_(model, shown)
        elbo = ELBO(model, loss, total, config.prior)
        optimizer = make_optimizer(model, config)
        dtype = next(model.parameters()).dtype
        compile_(elbo, config)
        step_module, step_optimizer = fabric.setup(elbo, optimizer)
        if not fabric.is_global_zero:
            listener = None
        run = EpochRunner(
            fabric, config, step_module, step_optimizer, placed, absent, listener, keep_zeros=keep_zeros
        )
        state = FitState(fabric, config, elbo, optimizer, checkpoint)
        rows = state.restore()
        restored = len(rows)
        check_same_start(fabric, restored)
        if listener is not None:
            listener.on_start(_title(model, restored, keep_zeros), config.epochs)
        for epoch in range(restored, config.epochs):
            nll, kl, seconds, examples = run.epoch(epoch)
            _check_finite(epoch, nll, kl, model, state.saved)
            set_threshold_(model, threshold)
            error = None
            if validation is not None:
                error = measure_error(model, _cast(validation, fabric, config), metric)
            beta, rate, speed = run.beta(epoch), config.lr * run.rate(epoch), examples / seconds
            sparsity = _sparsity(model, threshold)
            rows.append(EpochRow(epoch + 1, nll, kl, beta, error, sparsity, rate, seconds, speed))
            state.keep(rows)
            if listener is not None:
                listener.on_epoch(rows[-1], config.epochs)
        set_threshold_(model, KEEP_ALL)
        share_buffers_(fabric, model)
        optimizer.zero_grad(set_to_none=True)  # CUDA graphs' memory goes with the compiled code
    if config.precision == "64-true":
        model.to(dtype)
    lay_out_(model, torch.contiguous_format)
    forget_calls_(model)
    model.eval()
    return FitResult(model, tuple(rows), fabric.is_global_zero, restored)


def _checked(model: nn.Module, config: FitConfig | None) -> FitConfig:
    """The configuration. Raises ConfigError where it is none, or the model is no network."""
    check_network("fit", model)
    config = FitConfig() if config is None else config
    if not isinstance(config, FitConfig):
        told = f"config is a {type(config).__name__}, allowed is a FitConfig."
        raise ConfigError("fit", told, "vbdcompress.FitConfig(epochs=10)")
    return config


def _dropout_share(config: FitConfig, teacher: nn.Module | None) -> float:
    """How much of the network's own dropout stays: none where it follows a teacher, unless asked for."""
    if config.dropout is not None:
        return config.dropout
    return 1.0 if teacher is None or config.distill_share == 0 else 0.0


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


def _place(loader: Iterable[Any], fabric: Fabric, seed: int) -> Any:
    """The loader's share of this process: tensors move to the device, a DataLoader gets its sampler."""
    if isinstance(loader, TensorBatches):
        if loader.batch_size < fabric.world_size:
            raise FitError("fit", f"a batch of {loader.batch_size} can't be shared by {fabric.world_size}.")
        return loader.on(fabric.device, fabric.global_rank, fabric.world_size)
    if fabric.world_size == 1:
        return loader
    if isinstance(loader, Unpacked):
        return Unpacked(_place(loader.loader, fabric, seed), loader.unpack)
    if isinstance(loader, DataLoader):
        return share(loader, seed, fabric.global_rank, fabric.world_size)
    raise FitError(
        "fit",
        f"a {type(loader).__name__} can't be shared by {fabric.world_size} processes.",
        "Use a torch DataLoader.",
    )


def _first_inputs(batches: Iterable[Any]) -> Inputs | None:
    """What the first batch holds; None where there is none."""
    batch = next(iter(batches), None)
    return None if batch is None else batch[0]


def _title(model: nn.Module, done: int, keep_zeros: bool) -> str:
    posteriors = find_posteriors(model)
    count = sum(posterior.theta.numel() for posterior in posteriors)
    what = "weights" if any(posterior.kind == "weight" for posterior in posteriors) else "channel gates"
    title = (
        f"Fitting the posterior of {count:,} {what}"
        if posteriors
        else FINE_TUNING
        if keep_zeros
        else "Training"
    )
    return f"{title}, going on after epoch {done}" if done else title


def _sparsity(model: nn.Module, threshold: float) -> float | None:
    posteriors = find_posteriors(model)
    if not posteriors:
        return None
    with torch.no_grad():
        # one sum on the device: each number read would wait for it
        removed = int(torch.stack([(p.log_alpha() >= threshold).sum() for p in posteriors]).sum())
    return removed / sum(p.theta.numel() for p in posteriors)
