"""The command line in this process: what it writes, prints and exits with."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from vbdcompress.cli.main import COMMANDS, main
from vbdcompress.progress import FitProgress

FILES = ["model.onnx", "report.html", "report.json", "slim.safetensors"]
QUICK = ["--epochs", "2", "--finetune-epochs", "1"]


def test_run_writes_the_four_files_and_nothing_else(finished):
    assert sorted(item.name for item in finished.iterdir()) == FILES
    content = json.loads((finished / "report.json").read_text())
    assert content["name"] == "digits"
    assert content["data"]["validation_held_out"] is True
    assert content["error_split"] == "test"
    assert str(finished.parent) not in (finished / "report.json").read_text()


def test_report_renders_again(cli, finished):
    page = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    code, out, _ = cli("report", finished)
    assert code == 0
    assert "test error" in out
    assert (finished / "report.html").read_text() == page


def test_run_refuses_a_folder_that_is_there(cli, finished, zoo):
    before = (finished / "report.json").read_bytes()
    code, _, err = cli("run", zoo / "digits.pt", "--out", finished, *QUICK)
    assert code == 2
    assert "exists and holds files" in err
    assert "--overwrite" in err
    assert (finished / "report.json").read_bytes() == before


def test_run_makes_a_slim_file_smaller_still(cli, finished, zoo, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    quick = ["--epochs", "2", "--finetune-epochs", "0"]
    cli("run", zoo / "digits.pt", "--out", first, *quick, "--threshold", "-7")
    # A second run that removes no channel where the first did: the files need both plans
    code, _, _ = cli("run", first / "slim.safetensors", "--out", second, *quick, "--threshold", "9")
    assert code == 0
    sizes = [json.loads((out / "report.json").read_text())["size"]["after"] for out in (first, second)]
    assert sizes[0]["parameters"] == sizes[1]["parameters"] < 13_000
    told = [json.loads(cli("evaluate", second / name, "--json")[1]) for name in ("", "slim.safetensors")]
    assert told[0]["error"] == told[1]["error"]


def test_run_overwrites_its_own_files_and_keeps_others(cli, finished, zoo, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    (out / "notes.txt").write_text("mine")
    (out / "model_int8.onnx").write_text("of the earlier run")
    code, _, _ = cli("run", zoo / "digits.pt", "--out", out, "--overwrite", "--seed", "5", *QUICK)
    assert code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "model_int8.onnx").exists()
    assert json.loads((out / "report.json").read_text())["seed"] == 5


def test_run_goes_on_after_ctrl_c_as_if_nothing_had_been(cli, zoo, tmp_path, monkeypatch):
    options = ["--epochs", "6", "--finetune-epochs", "0", "--seed", "3"]
    cli("run", zoo / "digits.pt", "--out", tmp_path / "unbroken", *options)
    real = FitProgress.on_epoch

    def interrupt(self, row, epochs):
        real(self, row, epochs)
        if row.epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(FitProgress, "on_epoch", interrupt)
    code, _, err = cli("run", zoo / "digits.pt", "--out", tmp_path / "broken", *options)
    assert code == 130
    assert "--resume" in err
    monkeypatch.setattr(FitProgress, "on_epoch", real)
    code, _, err = cli("run", zoo / "digits.pt", "--out", tmp_path / "broken", *options)
    assert code == 2
    assert "unfinished run" in err
    code, out, _ = cli("run", zoo / "digits.pt", "--out", tmp_path / "broken", "--resume", *options)
    assert code == 0
    assert "going on after epoch" in out
    one, other = ((tmp_path / name / "slim.safetensors").read_bytes() for name in ("unbroken", "broken"))
    assert one == other


def test_run_takes_a_toml_and_flags_win(cli, zoo, tmp_path):
    config = tmp_path / "quick.toml"
    config.write_text('mode = "channels"\nepochs = 1\nfinetune_epochs = 0\nseed = 4\nbeta = 3.0\n')
    code, _, _ = cli("run", zoo / "digits.pt", "--out", tmp_path / "out", "--config", config, "--seed", "7")
    assert code == 0
    told = json.loads((tmp_path / "out" / "report.json").read_text())["config"]
    assert (told["mode"], told["epochs"], told["seed"], told["beta"]) == ("channels", 1, 7, 3.0)
    config.write_text("epoch = 1\n")
    code, _, err = cli("run", zoo / "digits.pt", "--out", tmp_path / "x", "--config", config)
    assert code == 2
    assert "did you mean 'epochs'" in err


def test_run_warns_where_the_file_does_not_say_its_split(cli, zoo, tmp_path):
    state = torch.load(zoo / "digits.pt", weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "bare.pt")
    out = tmp_path / "out"
    code, printed, _ = cli(
        "run", tmp_path / "bare.pt", "--arch", "digits", "--data", "digits", "--out", out, *QUICK
    )
    assert code == 0
    assert "may have been trained on its validation" in " ".join(printed.split())
    assert "may have been trained" in " ".join(json.loads((out / "report.json").read_text())["warnings"])
    # what it wrote knows no more than it did
    second = tmp_path / "second"
    assert cli("run", out / "slim.safetensors", "--out", second, *QUICK)[0] == 0
    assert "may have been trained" in " ".join(json.loads((second / "report.json").read_text())["warnings"])
    for name in ("model.onnx", "slim.safetensors"):
        _, _, err = cli("evaluate", out / name, "--split", "validation")
        assert "it may have seen some of this split" in err


def test_zoo_lists_networks(cli, zoo):
    code, out, _ = cli("zoo", zoo)
    assert code == 0
    assert "digits.pt" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nowhere.pt"], 1, "does not exist"),
        (["run", "ZOO", "--data", "mnits"], 1, "did you mean 'mnist'"),
        (["run", "ZOO", "--threshold", "3", "--max-params", "10%"], 2, "give one of them"),
        (["run", "ZOO", "--max-params", "tenth"], 2, "neither a whole number nor a share"),
        (["run", "ZOO", "--max-macs", "150%"], 2, "at most 100%"),
        (["run", "ZOO", "--epochs", "many"], 2, "not a valid integer"),
        (["run", "ZOO", "--mode", "units"], 2, "'units' is not one of"),
        (["run", "ZOO", "--resume"], 2, "no unfinished run"),
        (["run", "ZOO", "--skip", "conv9"], 1, "no layer is named 'conv9'"),
        (["run", "ZOO", "--device", "gpu"], 2, "'gpu' is not one of"),
        (["run", "ZOO", "--data", "mnist"], 1, "needs a folder"),
        (["shrink"], 2, "No such command"),
        (["evaluate", "nowhere.onnx"], 2, "does not exist"),
        (["report", "."], 1, "can't be read"),
        (["zoo", "nowhere"], 2, "'nowhere' is no folder"),
        (["bench", "ZOO", "--seconds", "-1"], 2, "-1.0 is not in the range x>0.0"),
        (["train", "lenet6", "--data", "digits", "--out", "x.pt"], 1, "did you mean 'lenet5'"),
    ],
)
def test_wrong_use_is_one_clear_paragraph(cli, zoo, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VBDCOMPRESS_DATA", raising=False)
    found, _, err = cli(*[str(zoo / "digits.pt") if item == "ZOO" else item for item in arguments])
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_read_only_folder_is_an_error_and_nothing_is_lost(cli, zoo, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    code, _, err = cli("run", zoo / "digits.pt", "--out", tmp_path / "locked" / "out", *QUICK)
    assert code == 1
    assert "Permission denied" in err
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(zoo, tmp_path):
    with pytest.raises(Exception, match="does not exist"):
        main(["run", str(tmp_path / "nowhere.pt"), "--debug"])


def test_a_pickled_network_is_refused_with_exit_code_1(cli, tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    code, _, err = cli("run", tmp_path / "whole.pt", "--data", "digits")
    assert code == 1
    assert "would run code when read" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(cli, name):
    code, out, _ = cli(name, "--help")
    assert code == 0
    assert "Example" in out
    assert f"vbdcompress {name}" in out


def test_help_does_not_wait_for_torch():
    check = "import sys; from vbdcompress.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    check += "assert not {'torch', 'pydantic', 'rich', 'numpy'} & set(sys.modules), 'slow imports'"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Compress a trained network" in done.stdout


def test_run_refuses_a_data_set_with_more_classes_than_the_network(cli, zoo, tmp_path):
    labels = np.arange(60) % 12
    np.savez(tmp_path / "set.npz", images=np.zeros((60, 8, 8), np.uint8), labels=labels)
    code, _, err = cli("run", zoo / "digits.pt", "--data", tmp_path / "set.npz", "--out", tmp_path / "out")
    assert code == 1
    assert "labels up to 11, the network has 10 outputs" in " ".join(err.split())
    assert not (tmp_path / "out").exists()
    code, _, err = cli("evaluate", zoo / "digits.pt", "--data", tmp_path / "set.npz", "--split", "validation")
    assert code == 1
    assert "labels up to 11, the network has 10 outputs" in " ".join(err.split())


def test_run_refuses_images_that_the_network_can_not_take(cli, zoo, tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((60, 9, 13), np.uint8), labels=np.arange(60) % 10)
    code, _, err = cli("run", zoo / "digits.pt", "--data", tmp_path / "set.npz", "--out", tmp_path / "out")
    assert code == 1
    assert "fails on a batch of shape (2, 1, 9, 13)" in " ".join(err.split())


def test_run_says_which_normalisation_it_took_and_takes_the_user_s(cli, zoo, tmp_path):
    content = torch.load(zoo / "digits.pt", weights_only=True)
    torch.save(content["state_dict"], tmp_path / "bare.pt")
    bare = [tmp_path / "bare.pt", "--arch", "digits", "--data", "digits"]
    _, out, _ = cli("run", *bare, "--out", tmp_path / "out", "--epochs", "1", "--finetune-epochs", "0")
    assert "does not say how its inputs were normalised" in " ".join(out.split())
    mean, std = content["input"]["mean"][0], content["input"]["std"][0]
    _, out, _ = cli("evaluate", *bare, "--json", "--mean", mean, "--std", std)
    assert json.loads(out)["error"] == pytest.approx(content["training"]["test_error"])
    _, out, _ = cli("evaluate", *bare, "--json", "--mean", "0.9", "--std", "3")
    assert json.loads(out)["error"] > content["training"]["test_error"] + 1
    code, _, err = cli("evaluate", *bare, "--mean", "0.9")
    assert code == 2
    assert "go together" in err


def test_resume_refuses_another_network_and_takes_another_threshold(cli, zoo, tmp_path, monkeypatch):
    options = ["--out", tmp_path / "out", "--epochs", "4", "--finetune-epochs", "4"]
    real = FitProgress.on_epoch

    def interrupt(self, row, epochs):
        real(self, row, epochs)
        if row.sparsity is None and row.epoch == 2:  # while fine-tuning
            raise KeyboardInterrupt

    monkeypatch.setattr(FitProgress, "on_epoch", interrupt)
    assert cli("run", zoo / "digits.pt", *options)[0] == 130
    monkeypatch.setattr(FitProgress, "on_epoch", real)
    content = torch.load(zoo / "digits.pt", weights_only=True)
    content["state_dict"]["fc2.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    code, _, err = cli("run", tmp_path / "other.pt", *options, "--resume")
    assert code == 1
    assert "network was" in err
    code, out, _ = cli("run", zoo / "digits.pt", *options, "--resume", "--threshold", "-1.5")
    assert code == 0
    assert out.count("going on after epoch 4") == 1  # the fit is kept, the fine-tuning starts anew
    assert "Fine-tuning  (4 epochs)" in out


def test_max_bytes_holds_for_the_file(cli, zoo, tmp_path):
    out = tmp_path / "out"
    code, _, _ = cli("run", zoo / "digits.pt", "--out", out, "--max-bytes", "9000", *QUICK, "--beta", "60")
    assert code == 0
    assert (out / "model.onnx").stat().st_size <= 9000
    assert json.loads((out / "report.json").read_text())["stages"][0]["selection"]["limits"] == {
        "bytes": 9000
    }


def test_overwrite_keeps_the_old_results_until_there_are_new_ones(cli, finished, zoo, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    code, _, _ = cli("run", zoo / "digits.pt", "--out", out, "--overwrite", "--skip", "conv9")
    assert code == 1
    assert sorted(item.name for item in out.iterdir()) == FILES
