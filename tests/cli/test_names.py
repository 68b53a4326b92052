"""Names of files and folders are printed as they are, whatever rich would make of them."""

import io
import shutil
import sys

import onnx
import pytest
from onnx import TensorProto, helper

from vbdcompress.cli.main import main

# rich's markup for bold, an emoji of its own, and a closing tag
NAME = "net[bold]:bee:[/bold]"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in, and lines long enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    return tmp_path


def test_run_prints_names_as_they_are(cli, zoo, place):
    shutil.copy(zoo / "digits.pt", place / "net[best].pt")
    code, out, _ = cli(
        "run", "net[best].pt", "--out", "out[a=1]:bee:", "--epochs", "1", "--finetune-epochs", "0"
    )
    assert code == 0
    assert "net[best].pt: digits on digits" in out
    assert "Written to out[a=1]:bee:: model.onnx" in out
    assert (place / "out[a=1]:bee:" / "model.onnx").is_file()


def test_train_prints_names_as_they_are(cli, place):
    code, out, _ = cli("train", "digits", "--data", "digits", "--out", "[b]net.pt", "--epochs", "1")
    assert code == 0
    assert "Written to [b]net.pt: " in out


def test_inspect_and_zoo_print_names_as_they_are(cli, zoo, place):
    folder = place / NAME
    folder.mkdir(parents=True)
    shutil.copy(zoo / "digits.pt", folder / "net[best].pt")
    code, out, _ = cli("inspect", folder / "net[best].pt")
    assert code == 0
    assert "net[best].pt: digits, 13,754 parameters" in out
    code, out, _ = cli("zoo", NAME)
    assert code == 0
    assert f"Networks in {NAME}" in out
    assert "net[best].pt" in out
    (folder / "net[best].pt").unlink()
    assert f"No checkpoints in '{NAME}'." in cli("zoo", NAME)[1]


def test_bench_prints_names_as_they_are(cli, place):
    (place / NAME).mkdir(parents=True)
    identity = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        *([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])] for name in "xy"),
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(identity, opset_imports=opsets, ir_version=8), place / NAME / "model.onnx")
    code, out, _ = cli("bench", NAME, "--batch", "1", "--threads", "1", "--seconds", "0.01")
    assert code == 0
    assert f"{NAME}/model.onnx" in out


def test_a_name_that_the_console_can_not_show_ends_nothing(place, monkeypatch):
    (place / "\N{CJK UNIFIED IDEOGRAPH-672C}").mkdir()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    main(["zoo", "\N{CJK UNIFIED IDEOGRAPH-672C}"])
    sys.stdout.flush()
    assert b"No checkpoints in '?'." in written.getvalue()
