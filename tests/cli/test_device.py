"""Commands on a device that is not the CPU: simulated, so that what a GPU would refuse is refused here."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).with_name("simulated.py")
QUICK = ["--epochs", "2", "--finetune-epochs", "1", "--seed", "1"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler to make the device with")
    spec = importlib.util.spec_from_file_location("simulated", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    simulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulated)
    path: Path = simulated.compile_library(tmp_path_factory.mktemp("device"))
    return path


def on_device(library: Path, *arguments: Any) -> None:
    command = [sys.executable, str(PROGRAM), str(library), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def assert_runs_alike(library: Path, cli: Any, folder: Path, *given: Any, before: Sequence[Any] = ()) -> None:
    """The same run there, after other commands, and on the CPU: the same noise, summed in another order."""
    on_device(library, *before, "run", *given, *QUICK, "--out", folder / "there")
    code, _, err = cli("run", *given, *QUICK, "--device", "cpu", "--out", folder / "here")
    assert code == 0, err
    there, here = (json.loads((folder / name / "report.json").read_text()) for name in ("there", "here"))
    assert there["environment"]["device"] == "simulated:0"
    for stage, like in zip(there["stages"], here["stages"], strict=True):
        one, other = stage["epochs"][-1], like["epochs"][-1]
        assert one["nll"] == pytest.approx(other["nll"], rel=0.1)
        assert one["kl"] == pytest.approx(other["kl"], rel=0.1)


def test_train_and_run_do_there_what_they_do_here(library, cli, tmp_path):
    given = ["train", "digits", "--data", "digits", "--epochs", "4"]
    before = [*given, "--out", tmp_path / "there.pt", "+"]
    run = [tmp_path / "there.pt", "--mode", "both", "--bits", "auto"]
    assert_runs_alike(library, cli, tmp_path, *run, before=before)
    code, _, err = cli(*given, "--device", "cpu", "--out", tmp_path / "here.pt")
    assert code == 0, err
    there, here = (
        torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("there.pt", "here.pt")
    )
    assert all(torch.allclose(there[name], here[name], rtol=0.05, atol=0.02) for name in here)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--mode channels --precision bf16-mixed --int8 --cost macs --prune-inputs --max-macs 60%",
        "--prior vd --distill 0.5 --clip-norm 1 --max-bytes 30000",
    ],
)
def test_run_takes_its_options_there(library, zoo, cli, tmp_path, options):
    assert_runs_alike(library, cli, tmp_path, zoo / "digits.pt", *options.split())
