"""--track: every epoch and the result arrive in the trackers' own files, read back by their own libraries."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vbdcompress.cli.main import main
from vbdcompress.errors import ConfigError
from vbdcompress.records import EpochRow
from vbdcompress.tracking import Tracker, open_tracker

REPORT: dict[str, Any] = {
    "size": {"after": {"macs": 120.0}, "compression_ratio": {"macs": 4.0}},
    "errors": {"validation": {"before": 1.0, "after": 1.5}, "test": None},
}


def track(kind: str, folder: Path) -> None:
    tracker = open_tracker(kind, "a run", folder, {"beta": 6.0, "mode": "channels"})
    tracker.on_start("Fitting the posterior of 3 channel gates", 2)
    for epoch, error in ((1, None), (2, 3.5)):
        tracker.on_epoch(EpochRow(epoch, 0.5 / epoch, 0.25, 6.0, error, 0.1, 1e-3, 2.0, 100.0), 2)
    tracker.on_start("Fine-tuning", 1)
    tracker.on_epoch(EpochRow(1, 0.125, 0.0, 0.0, 2.5, None, 1e-4, 2.0, 100.0), 1)
    tracker.finish(REPORT)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(item.step, item.value) for item in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_epoch_and_the_result(tmp_path: Path) -> None:
    track("tensorboard", tmp_path)
    found = read_events(tmp_path)
    assert "hp_metric" not in found  # which nobody logged
    assert found["stage1/nll"] == [(1, 0.5), (2, 0.25)]
    assert found["stage1/error"] == [(2, 3.5)]
    assert found["finetune/nll"] == [(3, 0.125)]
    assert "finetune/sparsity" not in found
    assert found["times_fewer/macs"] == [(0, 4.0)]
    assert found["validation_error/after"] == [(0, 1.5)]


def test_a_tracker_that_fails_is_told_of_once_and_tried_again() -> None:
    sent: list[int] = []

    class Flaky:
        errors = (OSError,)

        def log(self, values: Any, step: int) -> None:
            if step in (1, 2):
                raise ConnectionError("the server is away")
            sent.append(step)

        def finish(self, values: Any) -> None:
            raise ConnectionError("the server is away")

        def fail(self) -> None:
            raise ConnectionError("the server is away")

    tracker = Tracker(Flaky())
    tracker.on_start("Fine-tuning", 3)
    row = EpochRow(1, 0.5, 0.25, 6.0, None, 0.1, 1e-3, 2.0, 100.0)
    with pytest.warns(UserWarning, match="ConnectionError: the server is away"):
        tracker.on_epoch(row, 3)
    for epoch in (2, 3):  # without another warning, which would be an error here
        tracker.on_epoch(replace(row, epoch=epoch), 3)
    tracker.finish(REPORT)
    assert sent == [3]


class StopError(Exception):
    """Ends a run."""


def fail(kind: str, folder: Path) -> None:
    tracker = open_tracker(kind, "a run", folder, {})
    tracker.on_start("Fine-tuning", 3)
    tracker.on_epoch(EpochRow(1, 0.5, 0.25, 6.0, None, 0.1, 1e-3, 2.0, 100.0), 3)
    with pytest.raises(StopError), tracker:
        raise StopError


def test_a_failed_run_keeps_its_epochs(tmp_path: Path) -> None:
    fail("tensorboard", tmp_path)
    assert read_events(tmp_path)["finetune/nll"] == [(1, 0.5)]


@pytest.mark.filterwarnings("ignore")  # of the library's own
def test_mlflow_knows_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    fail("mlflow", tmp_path)
    (run,) = mlflow.search_runs(experiment_names=["vbdcompress"], output_format="list")
    assert run.info.status == "FAILED"


def test_run_closes_its_tracker_where_it_fails(
    tmp_path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    class Kept:
        errors = ()

        def log(self, values: Any, step: int) -> None: ...

        def finish(self, values: Any) -> None:
            ended.append("finished")

        def fail(self) -> None:
            ended.append("failed")

    def stop(*_: Any, **__: Any) -> None:
        raise ConfigError("run", "ends here.")

    monkeypatch.setattr("vbdcompress.tracking.open_tracker", lambda *_: Tracker(Kept()))
    monkeypatch.setattr("vbdcompress.pipeline.run_stages", stop)
    with pytest.raises(SystemExit):
        main(["run", str(zoo / "digits.pt"), "--out", str(tmp_path / "out"), "--track", "wandb"])
    assert ended == ["failed"]


def test_a_run_that_goes_on_tracks_where_it_stopped(tmp_path: Path) -> None:
    tracker = open_tracker("tensorboard", "a run", tmp_path, {})
    row = EpochRow(3, 0.5, 0.25, 6.0, None, 0.1, 1e-3, 2.0, 100.0)
    tracker.on_start("Fitting the posterior of 3 channel gates", 4)  # done: no epoch of it comes
    tracker.on_start("Fitting the posterior of 9 weights, going on after epoch 2", 3)
    tracker.on_epoch(row, 3)
    tracker.on_start("Fine-tuning", 1)
    tracker.on_epoch(replace(row, epoch=1), 1)
    tracker.finish(REPORT)
    found = read_events(tmp_path)
    assert found["stage2/nll"] == [(7, 0.5)]
    assert found["finetune/nll"] == [(8, 0.5)]


def test_run_tracks_what_its_report_says(tmp_path: Path, zoo: Path) -> None:
    out = tmp_path / "out"
    track("tensorboard", out / "tracking")  # of an earlier run, of stages of the same names
    options = ["--epochs", "2", "--finetune-epochs", "1", "--track", "tensorboard", "--overwrite"]
    main(["run", str(zoo / "digits.pt"), "--out", str(out), *options])
    found = read_events(out / "tracking")
    assert [step for step, _ in found["stage1/nll"]] == [1, 2]
    assert [step for step, _ in found["finetune/nll"]] == [3]
    assert all(math.isfinite(value) for points in found.values() for _, value in points)
    assert found["test_error/after"]


@pytest.mark.filterwarnings("ignore")  # of the libraries' own
def test_mlflow_has_every_epoch_and_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    track("mlflow", tmp_path)
    (run,) = mlflow.search_runs(experiment_names=["vbdcompress"], output_format="list")
    assert run.data.params["mode"] == "channels"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "stage1/nll")
    assert [(item.step, item.value) for item in history] == [(1, 0.5), (2, 0.25)]
    assert run.data.metrics["times_fewer/macs"] == 4.0


@pytest.mark.filterwarnings("ignore")
def test_wandb_has_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track("wandb", tmp_path)
    (written,) = tmp_path.rglob("*.wandb")
    ends = time.monotonic() + 60
    while b"stage1/nll" not in (content := written.read_bytes()) and time.monotonic() < ends:
        time.sleep(0.1)  # its own process writes the file, and may be behind
    assert b"stage1/nll" in content
    assert b"times_fewer/macs" in content


def test_unknown_and_missing_trackers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="One of: tensorboard, wandb, mlflow"):
        open_tracker("paper", "a run", tmp_path, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        open_tracker("wandb", "a run", tmp_path, {})


@pytest.mark.filterwarnings("ignore")
def test_a_tracker_that_can_t_start_is_named(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("nowhere://here")
    try:
        with pytest.raises(ConfigError, match=r"'mlflow' can't start: .*nowhere"):
            track("mlflow", tmp_path)
    finally:
        mlflow.set_tracking_uri(before)


def test_a_run_whose_tracker_can_t_start_leaves_no_folder(
    tmp_path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("tracker", "no login.")

    monkeypatch.setattr("vbdcompress.tracking.open_tracker", refuse)
    with pytest.raises(SystemExit):
        main(["run", str(zoo / "digits.pt"), "--out", str(tmp_path / "out"), "--track", "wandb"])
    assert not (tmp_path / "out").exists()
