"""vbdcompress train: what it writes, and how it goes on."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vbdcompress.errors import FitError
from vbdcompress.progress import FitProgress

from .conftest import QUICK

TRAIN = ["train", "digits", "--data", "digits", "--epochs", "4", "--optimizer", "sgd", "--lr", "0.05"]


def test_train_then_run_on_the_user_s_npz(cli, tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = generator.integers(0, 60, (120, 8, 8)).astype(np.uint8)
    images[np.arange(120), labels] += 150
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    net = tmp_path / "net.pt"
    code, _, err = cli(
        "train",
        "digits",
        "--arch-arg",
        "classes=3",
        "--data",
        tmp_path / "set.npz",
        "--out",
        net,
        "--epochs",
        "8",
    )
    assert (code, err) == (0, "")
    code, _, err = cli(
        "run", net, "--data", tmp_path / "set.npz", "--out", tmp_path / "out", "--mode", "channels", *QUICK
    )
    assert (code, err) == (0, "")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["error_split"] == "validation"
    assert content["data"]["classes"] == ["0", "1", "2"]


def test_train_reads_a_recipe(cli, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('optimizer = "sgd"\nlr = 0.05\nepochs = 4\nseed = 3\n')
    whole = ["train", "digits", "--data", "digits", "--config", recipe, "--epochs", "1"]
    assert cli(*whole, "--out", tmp_path / "net.pt")[0] == 0
    training = torch.load(tmp_path / "net.pt", weights_only=True)["training"]
    assert [training[name] for name in ("optimizer", "lr", "epochs", "seed")] == ["sgd", 0.05, 1, 3]
    recipe.write_text("beta = 2.0\n")
    code, _, err = cli(*whole, "--out", tmp_path / "other.pt")
    assert code == 2
    assert "has options that `train` does not take: beta" in err


def test_train_goes_on_as_if_it_had_not_been_cut_off(cli, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    assert cli(*TRAIN, "--out", whole)[0] == 0
    on_epoch = FitProgress.on_epoch

    def stop(self, row, epochs):
        on_epoch(self, row, epochs)
        if row.epoch == 3:
            raise FitError("test", "cut off")

    with monkeypatch.context() as patch:
        patch.setattr(FitProgress, "on_epoch", stop)
        assert cli(*TRAIN, "--out", cut)[0] == 1
    assert not cut.exists()
    code, _, err = cli(*TRAIN, "--out", cut)
    assert (code, "--resume to go on" in err) == (2, True)
    code, printed, _ = cli(*TRAIN, "--out", cut, "--resume")
    assert (code, "going on after epoch" in printed) == (0, True)
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cut.pt", "whole.pt"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [(["--lr", "0.1"], "lr was 0.05, is 0.1"), (["--arch-arg", "classes=11"], "network was")],
)
def test_train_goes_on_with_the_same_training_only(cli, tmp_path, monkeypatch, changed, told):
    def stop(self, row, epochs):
        raise FitError("test", "cut off")

    with monkeypatch.context() as patch:
        patch.setattr(FitProgress, "on_epoch", stop)
        cli(*TRAIN, "--out", tmp_path / "net.pt")
    code, _, err = cli(*TRAIN, *changed, "--out", tmp_path / "net.pt", "--resume")
    assert (code, told in " ".join(err.split())) == (1, True)


def test_train_has_nothing_to_resume(cli, tmp_path):
    code, _, err = cli(*TRAIN, "--out", tmp_path / "net.pt", "--resume")
    assert (code, "no unfinished training" in err) == (2, True)


def test_train_that_fails_at_once_leaves_nothing(cli, tmp_path):
    code, _, err = cli(*TRAIN, "--lr", "1e30", "--out", tmp_path / "net.pt")
    assert (code, "not finite" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.ReLU(), nn.Linear(4, 2))
"""


def write_images(folder):
    for name, grey in (("cat", 60), ("dog", 200)):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (4, 4), (grey + number, grey, grey)).save(folder / name / f"{number}.png")


def test_train_warns_of_a_folder_that_it_does_not_read(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    for part in ("train", "val", "test"):
        write_images(tmp_path / "images" / part)
    (tmp_path / "mine.py").write_text(NETWORK)
    given = ["--data", tmp_path / "images", "--epochs", "1", "--out", tmp_path / "net.pt"]
    code, printed, err = cli("train", f"{tmp_path / 'mine.py'}:build", *given)
    assert (code, "val' was not read" in " ".join(printed.split())) == (0, True), err


@pytest.mark.parametrize(
    ("place", "asked", "recorded"),
    [
        ("photos", ".", "photos"),
        ("photos/cat", "..", "photos"),
        ("", "photos/", "photos"),
        ("", "./digits", "./digits"),
        ("", "digits/.", "./digits"),
        ("digits", ".", "./digits"),
    ],
)
def test_files_record_a_folder_by_its_name_and_never_as_a_known_set(
    cli, tmp_path, monkeypatch, place, asked, recorded
):
    for folder in ("photos", "digits"):
        write_images(tmp_path / folder)
    (tmp_path / "mine.py").write_text(NETWORK)
    arch, net, out = f"{tmp_path / 'mine.py'}:build", tmp_path / "net.pt", tmp_path / "out"
    monkeypatch.chdir(tmp_path / place)
    assert cli("train", arch, "--data", asked, "--epochs", "1", "--out", net)[0] == 0
    assert torch.load(net, weights_only=True)["data"] == recorded
    monkeypatch.chdir(tmp_path)  # from where the name leads to the folder
    held = ["--arch", arch, "--split", "validation", "--json"]
    code, printed, err = cli("evaluate", net, *held)
    assert (code, json.loads(printed)["data"]) == (0, recorded), err
    if asked == "./digits":
        assert cli("run", net, "--arch", arch, "--data", asked, "--out", out, *QUICK)[0] == 0
        assert json.loads((out / "report.json").read_text())["data"]["name"] == recorded
        assert cli("evaluate", out, "--split", "validation")[0] == 0
        shutil.rmtree("digits")
        code, _, err = cli("evaluate", out, "--split", "validation")
        assert (code, "'./digits': is neither a known name" in err, "did you mean" in err) == (1, True, False)


def test_files_record_a_known_set_by_its_name_where_a_folder_has_it_too(cli, tmp_path, monkeypatch):
    write_images(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert cli("train", "digits", "--data", "digits", "--epochs", "1", "--out", "net.pt")[0] == 0
    assert torch.load("net.pt", weights_only=True)["data"] == "digits"


def trained_by_two(*arguments):
    command = [sys.executable, "-m", "vbdcompress", *TRAIN, "--device", "cpu", "--devices", "2"]
    command += [str(item) for item in arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_train_does_not_write_over_a_folder(cli, tmp_path):
    code, _, err = cli(*TRAIN, "--out", tmp_path, "--overwrite")
    assert (code, "is a folder" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_and_leave_the_file_alone(tmp_path):
    ended = trained_by_two("--epochs", "1", "--out", tmp_path / "net.pt")
    assert (ended.returncode, "Written to" in ended.stdout) == (0, True), ended.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["net.pt"]


@pytest.mark.slow
def test_two_processes_that_may_not_go_on_say_so_without_a_traceback(cli, tmp_path, monkeypatch):
    def stop(self, row, epochs):
        raise FitError("test", "cut off")

    with monkeypatch.context() as patch:
        patch.setattr(FitProgress, "on_epoch", stop)
        cli(*TRAIN, "--out", tmp_path / "net.pt")
    ended = trained_by_two("--lr", "0.1", "--out", tmp_path / "net.pt", "--resume")
    told = " ".join(ended.stderr.split())
    assert (ended.returncode, "lr was 0.05, is 0.1" in told, "Traceback" in told) == (1, True, False), told
