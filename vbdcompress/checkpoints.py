"""The state of a fit on disk: written in one step, and refused where it is of another fit."""

import pickle
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from vbdcompress.config import MACHINE, FitConfig
from vbdcompress.errors import FitError
from vbdcompress.files import load_tensors, save_tensors
from vbdcompress.records import EpochRow

CHECKPOINT_SHARE = 0.05
START_ANEW = "Resume with the same options, or start anew with --overwrite."


@dataclass(frozen=True)
class FitCheckpoint:
    """Where a fit keeps its state, and whether it goes on from what is there.

    Attributes:
        path: of the file; written after the last epoch and after others as they are due.
        resume: go on from the file where there is one.
        every_seconds: between two writes; None takes 20 times what the last write took, so that
            small networks are kept after each epoch and large ones lose at most 5 % of the time.
    """

    path: Path
    resume: bool = False
    every_seconds: float | None = None

    def due(self, since: float, cost: float) -> bool:
        """Whether to write, `since` seconds after the last write, which took `cost` seconds."""
        return since >= (cost / CHECKPOINT_SHARE if self.every_seconds is None else self.every_seconds)


def _lay_out_moments_(optimizer: torch.optim.Optimizer) -> None:
    """Order moments in memory as their weights lie there: fused Adam pairs them by place, not by index."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _fingerprint(config: FitConfig) -> dict[str, Any]:
    """What must be equal for a checkpoint to go on; the machine's part may differ."""
    return {name: getattr(config, name) for name in FitConfig.model_fields if name not in MACHINE}


class FitState:
    """All that a fit needs to go on: what a checkpoint keeps."""

    def __init__(
        self,
        fabric: Fabric,
        config: FitConfig,
        elbo: nn.Module,
        optimizer: torch.optim.Optimizer,
        checkpoint: FitCheckpoint | None,
    ) -> None:
        self.fabric, self.config, self.elbo, self.optimizer = fabric, config, elbo, optimizer
        self.checkpoint = checkpoint
        self.saved = 0  # epochs that the file holds
        self._time_saved, self._cost = time.monotonic(), 0.0

    def keep(self, rows: list[EpochRow]) -> None:
        """After each epoch: write the state, if it is due."""
        now = time.monotonic()
        last = len(rows) == self.config.epochs
        if self.checkpoint and (last or self.checkpoint.due(now - self._time_saved, self._cost)):
            self._save(self.checkpoint.path, rows)
            self.saved, self._time_saved = len(rows), time.monotonic()
            self._cost = self._time_saved - now

    def _save(self, path: Path, rows: list[EpochRow]) -> None:
        if self.fabric.is_global_zero:
            content = {
                "config": _fingerprint(self.config),
                "rows": [asdict(row) for row in rows],
                "model": self.elbo.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.fabric.strategy.precision.state_dict(),  # of float16's gradients
            }
            save_tensors(path, content)

    def restore(self) -> list[EpochRow]:
        """The rows of the epochs that are done; network and optimizer are as they were after them."""
        checkpoint = self.checkpoint
        if checkpoint is None or not checkpoint.resume or not checkpoint.path.exists():
            return []
        where = f"checkpoint '{checkpoint.path}'"
        try:
            content = load_tensors(checkpoint.path)
            self._check_config(where, content["config"])
            self.elbo.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            _lay_out_moments_(self.optimizer)
            if content["scaler"]:
                self.fabric.strategy.precision.load_state_dict(content["scaler"])
            rows = [EpochRow(**row) for row in content["rows"]]
        except (KeyError, TypeError, pickle.UnpicklingError) as error:
            raise FitError(where, "is no checkpoint of a fit.", START_ANEW) from error
        except (RuntimeError, ValueError) as error:
            raise FitError(where, f"is of another network: {error}", START_ANEW) from error
        self.saved = len(rows)
        return rows

    def _check_config(self, where: str, saved: dict[str, Any]) -> None:
        differing = {
            name: (saved.get(name), value)
            for name, value in _fingerprint(self.config).items()
            if saved.get(name) != value
        }
        if differing:
            changes = ", ".join(f"{name} was {was}, is {now}" for name, (was, now) in differing.items())
            raise FitError(where, f"is of another fit: {changes}.", START_ANEW)
