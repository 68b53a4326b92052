"""fit in two processes on one CPU learns what it learns in one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vbdcompress

SECONDS = 90
# Log variances of -40: the noise vanishes, and the processes differ in nothing but their share.
SCRIPT = '''
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches, Unpacked
from vbdcompress.errors import FitError
from vbdcompress.checkpoints import FitCheckpoint
from vbdcompress.fitting import fit
from vbdcompress.vbd.layers import attach_posterior_


torch.set_num_threads(1)
labels = torch.arange(100) % 3
inputs = torch.randn(100, 6, generator=torch.Generator().manual_seed(5)) + labels[:, None]


def make_model(log_sigma2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    model[1].head = nn.Linear(16, 2)  # nothing calls it
    for layer in (model[0], model[2]):
        attach_posterior_(layer, log_sigma2)
    return model


def make_config(devices):
    return FitConfig(
        epochs=3,
        lr=0.01,
        lr_log_sigma2=0.01,
        devices=devices,
        device="cpu",
        warmup_epochs=1,
        compile="compile" in sys.argv,
    )


class Count:
    """Counts the examples; only the main process is told."""

    examples = 0

    def on_start(self, title, epochs): ...

    def on_epoch(self, row, epochs): ...

    def on_step(self, epoch, step, steps, examples):
        self.examples += examples


def train(devices, global_batch=20):
    """Epoch rows of two fits, one after the other: on tensors, then on a DataLoader."""
    count = Count()
    model, config = make_model(-40.0), make_config(devices)
    tensors = TensorBatches(inputs, labels, 20, shuffle=True)
    # each process takes its own batches of a DataLoader
    pairs = DataLoader(TensorDataset(labels, inputs), batch_size=global_batch)
    loader = Unpacked(pairs, lambda batch: (batch[1], batch[0]))
    results = [
        fit(model, batches, config, validation=tensors, listener=count) for batches in (tensors, loader)
    ]
    rows = [row for result in results for row in result.epochs]
    return [[row.nll, row.kl, row.beta, row.error] for row in rows], results[0].is_main, count.examples


class KeepFirst(Count):
    """Copies the checkpoint after the first epoch."""

    def __init__(self, target):
        self.target = target

    def on_epoch(self, row, epochs):
        if row.epoch == 1:
            shutil.copy("fit.ckpt", self.target)


def begin(devices):
    """The fit on tensors; its state after an epoch stays in part.ckpt."""
    tensors = TensorBatches(inputs, labels, 20, shuffle=True)
    checkpoint = FitCheckpoint(Path("fit.ckpt"), False, 0.0)
    config, listener = make_config(devices), KeepFirst("part.ckpt")
    fit(make_model(-40.0), tensors, config, validation=tensors, checkpoint=checkpoint, listener=listener)


def finish(checkpoint):
    """Epoch rows of that fit, gone on with in one process."""
    tensors = TensorBatches(inputs, labels, 20, shuffle=True)
    kept = FitCheckpoint(checkpoint, True, 1e9)
    rows = fit(make_model(-40.0), tensors, make_config(None), validation=tensors, checkpoint=kept).epochs
    return [[row.nll, row.kl, row.beta, row.error] for row in rows]


def lose(devices, how):
    """A fit whose second process is killed in the middle, or finds no checkpoint where the first does; or
    whose first step leaves out a bias that the second takes."""
    rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else 0
    calls, model = [], make_model(-40.0)

    def loss(output, target):
        calls.append(1)
        if how == "changing" and len(calls) == 1:
            output = output.detach() + model[2].bias
        if how == "killed" and rank == 1 and len(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(output, target)

    path = Path("part.ckpt" if how != "elsewhere" or rank == 0 else "elsewhere.ckpt")
    kept = FitCheckpoint(path, how == "elsewhere", 1e9)
    tensors = TensorBatches(inputs, labels, 20)
    fit(model, tensors, make_config(devices), loss=loss, checkpoint=kept)


def taken(devices):
    """Which examples this process trains on, epoch by epoch, where samplers draw them."""
    samplers = SubsetRandomSampler(range(0, 100, 2)), WeightedRandomSampler(1.0 + torch.arange(100), 40)
    found = []
    for sampler in samplers:
        seen = []

        def loss(output, numbers, seen=seen):
            seen.append(numbers.tolist())
            return nn.functional.cross_entropy(output, numbers % 3)

        loader = DataLoader(TensorDataset(inputs, torch.arange(100)), batch_size=5, sampler=sampler)
        fit(make_model(-3.0), loader, make_config(devices), loss=loss)
        found.append(seen)
    return found


def resume(devices):
    """Whether a fit on a shuffled DataLoader with noise, resumed after an epoch, ends the same."""
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=10, shuffle=True)
    whole, resumed = make_model(-3.0), make_model(-3.0)
    config = make_config(devices)
    kept, listener = FitCheckpoint(Path("fit.ckpt"), False, 0.0), KeepFirst("first.ckpt")
    fit(whole, loader, config, checkpoint=kept, listener=listener)
    rows = fit(resumed, loader, config, checkpoint=FitCheckpoint(Path("first.ckpt"), True, 1e9)).epochs
    states = whole.state_dict(), resumed.state_dict()
    return len(rows) == 3 and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


if __name__ == "__main__":
    devices = int(sys.argv[1]) if sys.argv[1] != "none" else None
    try:
        if "lose" in sys.argv:
            lose(devices, sys.argv[-1])
        begin(devices)
        rows, is_main, examples = train(devices, 10)
    except FitError as error:
        print("ERROR", str(error).replace("\\\\n", " "), flush=True)
        sys.exit(7)
    content = {"rows": rows, "resumed": resume(devices), "examples": examples, "taken": taken(devices)}
    content = json.dumps(content)
    sys.stdout.write(f"{'MAIN' if is_main else 'OTHER'} {content}\\n")  # one write: the output is shared
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "train.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(script: Path) -> list[list[float]]:
    """The rows of the same script in this process alone."""
    rows: list[list[float]] = runpy.run_path(str(script))["train"](None)[0]
    return rows


def run(script: Path, *command: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    ours = str(Path(vbdcompress.__file__).parents[1])
    outside = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    environment |= {"PYTHONPATH": ours, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=script.parent,
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    found = {word: json.loads(rest) for word, _, rest in lines if word in ("MAIN", "OTHER")}
    assert sorted(word for word, _, _ in lines if word in ("MAIN", "OTHER")) == ["MAIN", "OTHER"]
    return found


def check(found: dict[str, Any], expected: list[list[float]]) -> None:
    assert expected[0][1] > 1.0  # the KL of narrow posteriors is large, and a wrong scale would show
    for content in found.values():
        for row, wanted in zip(content["rows"], expected, strict=True):
            assert row == pytest.approx(wanted, rel=2e-5)
        assert content["resumed"]
    check_taken([content["taken"] for content in found.values()])
    # two fits of three epochs of a hundred; each process took its half
    assert [found[word]["examples"] for word in ("MAIN", "OTHER")] == [600, 0]


def check_taken(taken: list[list[list[list[int]]]]) -> None:
    """Process -> sampler -> batch -> examples: each is in one process's share of what the sampler draws."""
    halves, weighted = zip(*taken, strict=True)
    for epoch in range(3):
        drawn = [batch for half in halves for batch in half[5 * epoch : 5 * epoch + 5]]
        assert sorted(number for batch in drawn for number in batch) == list(range(0, 100, 2))
        assert drawn != [batch for half in halves for batch in half[:5]] or epoch == 0
    # with replacement: 40 of a hundred an epoch, and another sample for each process
    assert [len(half) for half in weighted] == [3 * 4, 3 * 4]
    assert weighted[0] != weighted[1]


@pytest.mark.timeout(SECONDS + 30)
def test_fit_with_devices_2_equals_one_process(script: Path, expected: list[list[float]]) -> None:
    check(rows_of(run(script, str(script), "2")), expected)
    # and what two processes began, one goes on with
    rows = runpy.run_path(str(script))["finish"](script.parent / "part.ckpt")
    for row, wanted in zip(rows, expected[:3], strict=True):
        assert row == pytest.approx(wanted, rel=2e-5)


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("killed", "processes: process 0 of 2 lost another one: it has ended or failed."),
        ("changing", "processes: the network's code takes other layers in this step than in the first"),
        pytest.param(
            "elsewhere",
            "resume: process 1 found a checkpoint of 0 epochs, other processes of others.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fit_says_that_a_process_is_lost(script: Path, how: str, found: str) -> None:
    if how == "elsewhere" and not (script.parent / "part.ckpt").exists():
        run(script, str(script), "none")
    done = run(script, str(script), "2", "lose", how)
    assert done.returncode == 7, done.stderr[-3000:]
    assert found in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS + 30)
def test_fit_compiled_with_devices_2_equals_one_process(script: Path, expected: list[list[float]]) -> None:
    check(rows_of(run(script, str(script), "2", "compile", seconds=4 * SECONDS)), expected)


@pytest.mark.timeout(SECONDS + 30)
def test_fit_under_torchrun_equals_one_process(script: Path, expected: list[list[float]]) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    check(rows_of(run(script, *launch, str(script), "none")), expected)


@pytest.mark.timeout(SECONDS + 30)
def test_fit_refuses_other_devices_than_torchrun_started(script: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    done = run(script, *launch, str(script), "2")
    assert done.returncode != 0
    assert "ERROR processes: --devices 2 was asked for, torchrun started 1 on this machine" in done.stdout
