"""Curves of a run in a tracker of the user's choice: TensorBoard, Weights & Biases or MLflow."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from vbdcompress.config import TrackerName
from vbdcompress.errors import ConfigError
from vbdcompress.records import EpochRow
from vbdcompress.training import FINE_TUNING, CutListener, Listener

PROJECT = "vbdcompress"
METRICS = ("nll", "kl", "beta", "error", "sparsity", "learning_rate", "examples_per_second")


class _Backend(Protocol):
    """A tracker's own library; `errors` are those of networks, disks and servers."""

    errors: tuple[type[Exception], ...]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves at one step."""

    def finish(self, values: Mapping[str, float]) -> None:
        """Results of the whole run; then the run is closed."""

    def fail(self) -> None:
        """Close the run, as one that failed."""


class Tracker:
    """A `training.Listener` that sends every epoch to a tracker: "stage1/nll", "finetune/error", ...

    A context manager: where the work inside ends by an exception, the run is closed as a failed one.

    Args:
        backend: of a tracker.
    """

    def __init__(self, backend: _Backend) -> None:
        self.backend = backend
        self.stages, self.part = 0, ""
        self.before, self.epochs = 0, 0  # epochs of the fits before this one, and of this one
        self.failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._send(self.backend.fail)

    def on_start(self, title: str, epochs: int) -> None:
        """Another fit: curves of its own."""
        self.before, self.epochs = self.before + self.epochs, epochs
        if title.startswith(FINE_TUNING):
            self.part = "finetune"
        else:
            self.stages += 1
            self.part = f"stage{self.stages}"

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """Nothing: epochs are what is compared."""

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        """One point on each curve; steps count the epochs of the whole run."""
        values = {name: getattr(row, name) for name in METRICS}
        known = {f"{self.part}/{name}": float(value) for name, value in values.items() if value is not None}
        self._send(lambda: self.backend.log(known, self.before + row.epoch))

    def finish(self, report: Mapping[str, Any]) -> None:
        """Errors and sizes of the finished run, and its end.

        Args:
            report: the content of report.json.
        """
        values = {f"size/{name}": float(value) for name, value in report["size"]["after"].items()}
        values |= {
            f"times_fewer/{name}": value for name, value in report["size"]["compression_ratio"].items()
        }
        for split, error in (report["errors"] or {}).items():
            values |= {f"{split}_error/{when}": value for when, value in (error or {}).items()}
        self._send(lambda: self.backend.finish(values))

    def _send(self, what: Callable[[], None]) -> None:
        """A tracker that can't be reached must not end a run: it is told of once, and tried again."""
        try:
            what()
        except self.backend.errors as error:
            if not self.failed:
                told = f"The tracker fails, and its curves will have gaps: {type(error).__name__}: {error}"
                warnings.warn(told, UserWarning, stacklevel=2)
            self.failed = True


class Listeners:
    """Several listeners as one."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = listeners

    def on_start(self, title: str, epochs: int) -> None:
        """Tell all."""
        for listener in self.listeners:
            listener.on_start(title, epochs)

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """Tell all."""
        for listener in self.listeners:
            listener.on_step(epoch, step, steps, examples)

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        """Tell all."""
        for listener in self.listeners:
            listener.on_epoch(row, epochs)

    def on_cut(self, done: int, cuts: int) -> None:
        """Tell those that listen to it."""
        for listener in self.listeners:
            if isinstance(listener, CutListener):
                listener.on_cut(done, cuts)


class _TensorBoard:
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, name: str, folder: Path, options: Mapping[str, Any]) -> None:
        self.logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        self.logger.log_hyperparams({key: str(value) for key, value in options.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(dict(values), step)

    def finish(self, values: Mapping[str, float]) -> None:
        self.logger.log_metrics(dict(values), 0)
        self.logger.finalize("success")

    def fail(self) -> None:
        self.logger.finalize("failed")  # writes the epochs that are still in memory


class _WandB:
    def __init__(self, name: str, folder: Path, options: Mapping[str, Any]) -> None:
        import wandb

        self.errors: tuple[type[Exception], ...] = (OSError, wandb.errors.Error)
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project=PROJECT, name=name, dir=folder, config=dict(options))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))
        self.run.finish()

    def fail(self) -> None:
        self.run.finish(exit_code=1)


class _MLflow:
    def __init__(self, name: str, folder: Path, options: Mapping[str, Any]) -> None:
        import mlflow

        self.mlflow = mlflow
        self.errors: tuple[type[Exception], ...] = (OSError, mlflow.exceptions.MlflowException)
        mlflow.set_experiment(PROJECT)
        mlflow.start_run(run_name=name)
        mlflow.log_params(dict(options))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def finish(self, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values))
        self.mlflow.end_run()

    def fail(self) -> None:
        self.mlflow.end_run("FAILED")


# name of the tracker, and of the package that it needs
_TRACKERS: dict[TrackerName, Callable[[str, Path, Mapping[str, Any]], _Backend]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def open_tracker(kind: TrackerName, name: str, folder: str | Path, options: Mapping[str, Any]) -> Tracker:
    """Start a run in a tracker; give it to `compress` as `listener`.

    Args:
        kind: "tensorboard", "wandb" or "mlflow"; where the last two send what they get is up to their own
            environment variables and logins.
        name: of the run.
        folder: for files: of events (tensorboard), or kept until they are sent (wandb).
        options: of the run.
    Raises:
        ConfigError: there is no such tracker, its package is not installed, or it can't start.
    """
    if kind not in _TRACKERS:
        raise ConfigError("track", f"no tracker is called '{kind}'.", f"One of: {', '.join(_TRACKERS)}")
    if importlib.util.find_spec(kind) is None:
        raise ConfigError("track", f"'{kind}' is not installed.", f"pip install {kind}")
    try:
        return Tracker(_TRACKERS[kind](name, Path(folder), options))
    except Exception as error:  # each tracker has exceptions of its own: of logins, addresses, versions
        raise ConfigError(
            "track", f"'{kind}' can't start: {error}", "Log in, or set it up by its environment variables."
        ) from error
