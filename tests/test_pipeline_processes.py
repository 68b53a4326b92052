"""compress in two processes that measure otherwise: both cut where the main one does."""

import os
import subprocess
import sys
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


def metric(output, target):  # the other process finds nothing wrong with any cut
    return (output.argmax(1) != target).double() * (rank == 0)


torch.manual_seed(0)
hidden = nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
model = nn.Sequential(*hidden, nn.Linear(64, 2))
for _ in range(60):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
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
told = f"DONE {nonzeros} {stage['selection']['threshold']}\\n"
sys.stdout.write(told)  # one write: the output is shared
"""


@pytest.mark.timeout(SECONDS + 30)
def test_all_processes_cut_where_the_main_one_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    ours = str(Path(vbdcompress.__file__).parents[1])
    outside = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    environment |= {"PYTHONPATH": ours, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, timeout=SECONDS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("DONE")]
    assert len(found) == 2
    assert found[0] == found[1]
