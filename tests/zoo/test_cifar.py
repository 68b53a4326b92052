"""The scripts under zoo/cifar: a slice of the work is cut off, carried elsewhere, and goes on to the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from waiting import wait_for

import vbdcompress
from vbdcompress.architectures import build_architecture
from vbdcompress.config import make_config, read_toml
from vbdcompress.count import measure_size
from vbdcompress.data import TensorBatches, load_data
from vbdcompress.loading import Loaded, load, save_checkpoint

ZOO = Path(__file__).parents[2] / "zoo"
IMAGES = 300
TRAIN = """
epochs = 15
batch_size = 50
optimizer = "sgd"
lr = 0.05
augment = "crop-flip"
"""
RUN = """
mode = "channels"
epochs = 2
beta = 50.0
batch_size = 50
warmup_epochs = 1
lr_gates = 0.3
finetune_epochs = 1
augment = "crop-flip"
"""


@pytest.fixture
def narrow(tmp_path: Path, data_root: Path) -> list[str]:
    """Arguments of slice.py: a few hundred images of CIFAR-10, a narrow VGG, recipes of a few epochs."""
    if not (data_root / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {data_root}")
    from torchvision.datasets import CIFAR10

    whole = CIFAR10(str(data_root), train=False)
    images = np.ascontiguousarray(whole.data.transpose(0, 3, 1, 2))[: 2 * IMAGES]
    labels = np.array(whole.targets)[: 2 * IMAGES]
    train, test = slice(IMAGES), slice(IMAGES, None)
    np.savez(
        tmp_path / "cifar.npz",
        images=images[train],
        labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )
    recipes = tmp_path / "zoo" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "vgg_cifar_train.toml").write_text(TRAIN)
    (recipes / "vgg_cifar_channels.toml").write_text(RUN)
    told = ["--data", str(tmp_path / "cifar.npz"), "--zoo", str(tmp_path / "zoo")]
    return [*told, "--arch-arg", "width=0.03", "--machine", "--device cpu", "--commit", "abc"]


def start(*arguments: Any) -> "subprocess.Popen[str]":
    ours = str(Path(vbdcompress.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, str(ZOO / "cifar" / "slice.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": ours, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("methods", [[], ["vbd", "taylor"]])
def test_slice_is_cut_off_carried_and_goes_on_to_the_end(
    tmp_path: Path, narrow: list[str], methods: list[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    steps = ["train-vgg_cifar", "store-vgg_cifar", *(f"vgg_cifar_channels-{method}-0" for method in methods)]
    narrow += [part for name in steps for part in ("--only", name)]
    running = start(*narrow, "--work", here, "--out", tmp_path / "first")
    wait_for(here / "dense" / ".training" / "vgg_cifar.pt" / "training.ckpt")
    running.send_signal(signal.SIGTERM)
    output = running.communicate(timeout=100)[0]
    assert running.returncode == 0, output
    (entry,) = json.loads((tmp_path / "first" / "slice.json").read_text())
    assert (entry["step"], entry["state"]) == ("train-vgg_cifar", "cut off"), output
    assert not (here / "dense" / "vgg_cifar.pt").exists()

    running = start(
        *narrow,
        "--work",
        there,
        "--out",
        tmp_path / "second",
        "--carry",
        tmp_path / "first",
        "--seconds",
        500,
    )
    output = running.communicate(timeout=520)[0]
    assert running.returncode == 0, output
    log = json.loads((tmp_path / "second" / "slice.json").read_text())
    assert [(entry["step"], entry["state"]) for entry in log] == [(step, "done") for step in steps], output
    assert output.splitlines()[0].endswith(", goes on")
    assert load(there / "zoo" / "vgg_cifar.pt").training["stored"] in ("bfloat16", "float32")
    results = {
        method: json.loads((there / "results" / "vgg_cifar_channels" / f"{method}-0.json").read_text())
        for method in methods
    }
    for result in results.values():
        assert result["size"]["macs"] <= results["vbd"]["size"]["macs"] < result["dense_size"]["macs"]
        assert result["epochs"] == 3
    assert sum(part.stat().st_size for part in (tmp_path / "second").glob("carry.*")) > 10_000


@pytest.mark.parametrize("inside", [False, True])
def test_a_finished_run_becomes_a_result(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    if inside:  # a virtual environment in the project's own folder
        monkeypatch.setattr(sys, "executable", str(ZOO.parent / ".venv" / "bin" / "python3"))
    plan, work = script("plan"), tmp_path / "work"
    monkeypatch.setattr(plan, "VBDCOMPRESS", (sys.executable, "-m", "vbdcompress"))
    options = plan.Options(work, ZOO, "cifar10", Path("data"), (), ("--precision", "bf16-mixed"))
    step = next(step for step in plan.all_steps(options) if step.name == "vgg_cifar_channels-vbd-0")
    step.made.parent.mkdir(parents=True)
    report = ZOO.parent / "exports" / "digits_channels" / "report.json"
    step.made.write_bytes(report.read_bytes())
    script("runner").Runner(options, {}, "abc", False).work_until([step], 0.0)
    found = json.loads((work / "results" / "vgg_cifar_channels" / "vbd-0.json").read_text())
    told = json.loads(report.read_text())
    assert found["test_error"] == told["errors"]["test"]["after"]
    assert found["size"] == told["size"]["after"]
    assert (found["row"], found["method"], found["seed"], found["commit"]) == (
        "vgg_cifar_channels",
        "vbd",
        0,
        "abc",
    )
    assert found["command"] == (
        "vbdcompress run zoo/vgg_cifar.pt --config zoo/recipes/vgg_cifar_channels.toml --seed 0 "
        "--out .runs/vgg_cifar_channels-vbd-0 --precision bf16-mixed"
    )


def test_slice_says_what_is_to_do(tmp_path: Path) -> None:
    running = start("--list", "--work", tmp_path / "work", "--out", tmp_path / "out")
    output = running.communicate(timeout=60)[0]
    assert running.returncode == 0, output
    lines = output.splitlines()
    assert "vgg_cifar_channels-vbd-0: to do" in lines
    order = ["step-cost", "resnet20_channels-vbd-0", "vgg_cifar_channels_small-magnitude-0"]
    places = [lines.index(f"{name}: to do") for name in [*order, "resnet20_channels-vbd-1"]]
    assert places == sorted(places)


def test_store_rounds_weights_and_says_the_error_of_what_it_wrote(script: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = build_architecture("digits").eval()
    split = {"fraction": 0.1, "seed": 0}
    save_checkpoint(
        tmp_path / "net.pt", Loaded(model, "digits", {}, "digits", data.input, split, {"lr": 1.0})
    )
    done = CliRunner().invoke(script("store").main, [str(tmp_path / "net.pt"), str(tmp_path / "small.pt")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "small.pt").stat().st_size < 0.6 * (tmp_path / "net.pt").stat().st_size
    stored = load(tmp_path / "small.pt")
    assert stored.training["stored"] == "bfloat16"
    assert stored.training["lr"] == 1.0
    for name, parameter in stored.model.named_parameters():
        expected = model.get_parameter(name)
        expected = expected.bfloat16().float() if expected.dim() >= 2 else expected
        assert torch.equal(parameter, expected)
    inputs, labels = data.test.inputs, data.test.labels
    wrong = (stored.model(inputs).argmax(1) != labels).double().mean()
    assert stored.training["test_error"] == pytest.approx(100 * float(wrong))


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_prune_reaches_the_macs_asked_for(script: Any, method: str) -> None:
    torch.manual_seed(0)
    model = build_architecture("resnet20", {"channels": (8, 8, 16)}).eval()
    images = torch.randn(20, 3, 32, 32)
    whole = measure_size(model, images[:2]).macs
    batches = TensorBatches(images, torch.arange(20) % 10, 10, shuffle=True)
    found = script("prune").prune(model, batches, method, whole // 3)
    assert 0.6 * (whole // 3) < measure_size(found, images[:2]).macs <= whole // 3
    assert found(images).shape == (20, 10)
    assert measure_size(model, images[:2]).macs == whole


def test_prune_by_layers_takes_the_same_share_of_each(script: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_architecture("resnet20", {"channels": (8, 8, 16)}).eval()
    with torch.no_grad():
        for block in model.blocks[:8]:  # over all layers at once, half of these go first
            block.conv1.weight[::2] *= 0.01
            block.conv2.weight[:, ::2] *= 0.01
    images = torch.randn(20, 3, 32, 32)
    batches = TensorBatches(images, torch.arange(20) % 10, 10)
    macs = measure_size(model, images[:2]).macs // 2
    widths = {}
    for scope in ("network", "layer"):
        found = script("prune").prune(model, batches, "magnitude", macs, scope)
        widths[scope] = [block.conv1.out_channels for block in found.blocks]
    assert widths["network"][8] == 16
    assert len(set(widths["layer"][:6])) == 1
    assert len(set(widths["layer"][6:])) == 1
    # and that is what the plan asks for, of the rows that say so
    plan, rows = script("plan"), script("cifar_rows")
    options = plan.Options(tmp_path, ZOO, "cifar10", None)
    asked = {step.name: step.command for step in plan.all_steps(options) if "-magnitude-" in step.name}
    for name, command in asked.items():
        row = rows.ROWS[name.partition("-")[0]]
        assert command[command.index("--scope") + 1] == row.magnitude


def test_every_recipe_of_the_rows_is_a_valid_configuration(script: Any) -> None:
    rows = script("cifar_rows")
    recipes = ZOO / "recipes"
    for row in rows.ROWS.values():
        assert row.network in rows.NETWORKS
        for method in row.methods:
            assert make_config(read_toml(recipes / row.recipe(method))).mode == row.mode
    for network in rows.NETWORKS:
        make_config(read_toml(recipes / rows.training_recipe(network)))


def test_slice_refuses_to_run_nothing_at_once(tmp_path: Path) -> None:
    running = start("--at-once", "0", "--work", tmp_path / "work", "--out", tmp_path / "out")
    assert "0 is not in the range x>=1" in running.communicate(timeout=60)[0]
