"""Two processes: both cut where the main one does, neither repeats the other, and one alone downloads."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import vbdcompress

SECONDS = 120
SCRIPT = """
import os
import random
import sys
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from vbdcompress import compress

warnings.simplefilter("ignore")
torch.set_num_threads(1)
rank = int(os.environ.get("LOCAL_RANK", 0))
inputs = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
labels = (inputs[:, 0] > 0).long()


class Scaled(Dataset):
    # augments by Python's random, as many do
    def __len__(self):
        return 200

    def __getitem__(self, number):
        return inputs[number] * random.uniform(0.5, 1.5), labels[number]


def metric(output, target):
    wrong = (output.argmax(1) != target).double()
    if rank == 0:
        return wrong
    if sys.argv[1] == "all":  # the other process finds nothing wrong with any cut
        return 0 * wrong
    known = any(output.shape == part.shape and torch.allclose(output, part, atol=1e-4) for part in original)
    return 0 * wrong if known else 0 * wrong + 1  # or finds all wrong


torch.manual_seed(0)
hidden = nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
model = nn.Sequential(*hidden, nn.Linear(64, 2))
for _ in range(60):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
with torch.no_grad():
    original = model.eval()(inputs).split(50)
random.seed(rank)
result = compress(
    model,
    DataLoader(Scaled(), batch_size=20, shuffle=True),
    validation=DataLoader(TensorDataset(inputs, labels), batch_size=50),
    metric=metric,
    mode="weights",
    epochs=4,
    warmup_epochs=1,
    lr_log_sigma2=0.2,
    finetune_epochs=2,
    max_error_increase=1.0,
    device="cpu",
    devices=2,
)
nonzeros = sum(int(each.count_nonzero()) for each in result.model.parameters())
stage = result.report["stages"][0]
state = sum(float(each.double().abs().sum()) for each in result.model.state_dict().values())
told = f"DONE {nonzeros} {stage['selection']['threshold']} {state!r}\\n"
sys.stdout.write(told)  # one write: the output is shared
"""


# Augments in a worker, by a loader with a generator of its own; the loss is told what was drawn.
WORKERS = """
import os
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vbdcompress.config import FitConfig
from vbdcompress.fitting import fit

torch.set_num_threads(1)


class Drawn(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, number):
        drawn = torch.rand(1)
        return drawn, drawn


def loss(output, target):
    seen.extend(target.flatten().tolist())
    return nn.functional.mse_loss(output, target)


seen = []
loader = DataLoader(Drawn(), 3, shuffle=True, num_workers=1, generator=torch.Generator())
fit(nn.Linear(1, 1), loader, FitConfig(epochs=1, device="cpu", devices=2), loss=loss)
sys.stdout.write("DONE " + " ".join(map(repr, seen)) + "\\n")
"""

# A set that can't be downloaded twice at once
READING = """
import sys
import time
from pathlib import Path

import numpy
import torchvision.datasets

from vbdcompress.cli import main


class Downloaded:
    data, targets = numpy.zeros([40, 28, 28], numpy.uint8), numpy.arange(40) % 10

    def __init__(self, root, train, download):
        file = Path(root) / f"train={train}"
        if not file.exists():
            with file.open("x") as opened:
                time.sleep(1)
                opened.write("whole")
        if file.read_text() != "whole":
            raise RuntimeError("half of it is there")


torchvision.datasets.MNIST = Downloaded
arguments = "train lenet_300_100 --data mnist --data-root . --epochs 1 --device cpu --out trained.pt"
main(arguments.split())
sys.stdout.write("DONE\\n")
"""


def run_in_two(tmp_path: Path, text: str, *arguments: str, launch: Sequence[str] = ()) -> list[list[str]]:
    """What each of two processes printed behind DONE; `launch` starts both, else the script does."""
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    ours = str(Path(vbdcompress.__file__).parents[1])
    outside = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    environment |= {"PYTHONPATH": ours, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, str(script), *arguments]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, timeout=SECONDS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("DONE")]
    assert len(found) == 2
    return found


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("accepted", [pytest.param("all", marks=pytest.mark.slow), "none"])
def test_all_processes_cut_where_the_main_one_does_and_end_alike(tmp_path: Path, accepted: str) -> None:
    first, other = run_in_two(tmp_path, SCRIPT, accepted)
    assert first == other


@pytest.mark.timeout(SECONDS + 30)
def test_processes_do_not_repeat_each_other_s_augmentation(tmp_path: Path) -> None:
    first, other = run_in_two(tmp_path, WORKERS)
    assert len(first) == len(other) == 6
    assert not set(first) & set(other)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 30)
def test_one_process_of_those_that_torchrun_starts_downloads(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run_in_two(tmp_path, READING, launch=launch)
    assert (tmp_path / "trained.pt").exists()
