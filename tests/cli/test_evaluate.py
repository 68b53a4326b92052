"""vbdcompress evaluate, and what model.onnx says of itself."""

import json
import re

import numpy as np
import onnx
import pytest
import torch

from vbdcompress.data import load_data
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.loading import load
from vbdcompress.pipeline import compress

QUICK = ["--epochs", "2", "--finetune-epochs", "1"]


def test_run_embeds_the_normalisation_and_says_what_the_file_is(cli, tmp_path, zoo):
    out = tmp_path / "digits"
    cli("run", zoo / "digits.pt", "--out", out, *QUICK, "--embed-preprocessing", "--bits", "16")
    content = json.loads((out / "report.json").read_text())
    assert content["input"]["embedded"] is True
    told = onnx.load(out / "model.onnx").metadata_props
    properties = {item.key: item.value for item in told}
    assert json.loads(properties["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(properties["input"]) == content["input"]
    assert f"{content['error']:.2f} %" in properties["error"]
    _, printed, _ = cli("evaluate", out, "--json")
    # a byte holds the 16 grey levels of these pictures to 0.2 %
    assert json.loads(printed)["error"] == pytest.approx(content["error"], abs=0.5)
    code, _, err = cli("evaluate", out / "model.onnx", "--mean", "0.5", "--std", "0.5")
    assert code != 0
    assert "model.onnx normalises by itself" in err


@pytest.mark.parametrize("name", ["", "model.onnx", "slim.safetensors"])
def test_evaluate_prints_the_report_s_error(cli, finished, name):
    told = json.loads((finished / "report.json").read_text())["error"]
    code, out, _ = cli("evaluate", finished / name, "--json")
    assert code == 0
    assert json.loads(out)["error"] == pytest.approx(told, abs=1e-9)


def test_evaluate_reads_what_an_onnx_file_says_of_itself(cli, finished, tmp_path):
    told = json.loads((finished / "report.json").read_text())["error"]
    alone = tmp_path / "renamed.onnx"
    alone.write_bytes((finished / "model.onnx").read_bytes())
    code, out, err = cli("evaluate", alone, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["error"] == pytest.approx(told, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 8])
def test_evaluate_takes_a_file_of_a_fixed_batch(cli, finished, tmp_path, batch):
    told = json.loads((finished / "report.json").read_text())["error"]
    proto = onnx.load(finished / "model.onnx")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(proto, tmp_path / "fixed.onnx")
    code, out, _ = cli("evaluate", tmp_path / "fixed.onnx", "--json")  # 449 examples: a last batch of one
    assert code == 0
    assert json.loads(out)["error"] == pytest.approx(told, abs=1e-9)


def test_evaluate_takes_the_split_that_a_file_names(cli, tmp_path, zoo):
    out = tmp_path / "out"
    options = ["--arch", "digits", "--data", "digits", "--mean", "0.3", "--std", "0.4", *QUICK]
    state = torch.load(zoo / "digits.pt", weights_only=True)["state_dict"]
    torch.save({name: tensor.float() for name, tensor in state.items()}, tmp_path / "state.pt")
    cli("run", tmp_path / "state.pt", "--out", out, *options, "--validation-fraction", "0.3", "--seed", "5")
    told = json.loads((out / "report.json").read_text())["errors"]["validation"]["after"]
    (out / "model.onnx").rename(tmp_path / "alone.onnx")
    _, printed, _ = cli("evaluate", tmp_path / "alone.onnx", "--split", "validation", "--json")
    assert json.loads(printed)["error"] == pytest.approx(told, abs=1e-9)
    broken = onnx.load(tmp_path / "alone.onnx")
    next(item for item in broken.metadata_props if item.key == "input").value = "{"
    onnx.save(broken, tmp_path / "broken.onnx")
    code, _, err = cli("evaluate", tmp_path / "broken.onnx")
    assert (code, "malformed properties" in err) == (1, True)


def test_evaluate_warns_where_nothing_says_how_inputs_were_normalised(cli, finished, tmp_path):
    silent = onnx.load(finished / "model.onnx")
    del silent.metadata_props[:]
    onnx.save(silent, tmp_path / "silent.onnx")
    code, _, err = cli("evaluate", tmp_path / "silent.onnx", "--data", "digits")
    assert (code, "does not say how its inputs were normalised" in " ".join(err.split())) == (0, True)
    asked = ["--data", "digits", "--mean", "0.3", "--std", "0.4"]
    assert cli("evaluate", tmp_path / "silent.onnx", *asked)[2] == ""


def test_evaluate_of_the_zoo_prints_the_error_before(cli, finished, zoo):
    told = json.loads((finished / "report.json").read_text())["errors"]
    for split in ("test", "validation"):
        _, out, _ = cli("evaluate", zoo / "digits.pt", "--json", "--split", split)
        assert json.loads(out)["error"] == pytest.approx(told[split]["before"], abs=1e-9)


def export_from_python(zoo, folder, spec):
    """What `compress` makes of the digits' network; `spec` None: nobody says how inputs are normalised."""
    dataset = load_data("digits", normalisation=spec)
    result = compress(
        load(zoo / "digits.pt").model,
        dataset.train_batches(48, seed=0),
        validation=dataset.validation_batches(),
        test=dataset.test_batches(),
        input=None if spec is None else dataset.input,
        mode="channels",
        epochs=1,
        finetune_epochs=0,
    )
    result.export(folder)


def test_evaluate_guesses_aloud_where_a_file_says_the_shape_alone(cli, tmp_path, zoo):
    export_from_python(zoo, tmp_path, None)
    for name in ("model.onnx", "slim.safetensors"):
        code, _, err = cli("evaluate", tmp_path / name, "--data", "digits", "--arch", "digits")
        assert (code, "does not say how its inputs were normalised" in err) == (0, True)


def test_evaluate_takes_validation_data_of_the_user_s_own(cli, tmp_path, zoo):
    dataset = load_data("digits", normalisation=load(zoo / "digits.pt").input)
    held = dataset.validation
    images = (held.inputs * dataset.input.std[0] + dataset.input.mean[0]) * 255
    np.savez(tmp_path / "held.npz", images=images.round().byte().numpy(), labels=(held.labels + 1) % 10)
    given = ["--validation", tmp_path / "held.npz", "--json"]
    code, out, err = cli("evaluate", zoo / "digits.pt", *given)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["error"] > 90  # its labels are shifted
    assert (found["split"], found["data"]) == ("validation", str(tmp_path / "held.npz"))


def test_a_split_of_other_examples_than_training_s_is_not_held_out(cli, tmp_path):
    generator = np.random.default_rng(0)
    for count in (60, 70):
        images = generator.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{count}.npz", images=images, labels=np.arange(count) % 10)
    made = ["train", "digits", "--data", tmp_path / "60.npz", "--out", tmp_path / "net.pt", "--epochs", "1"]
    assert cli(*made)[0] == 0
    for count in (60, 70):
        asked = ["--data", tmp_path / f"{count}.npz", "--split", "validation"]
        _, _, err = cli("evaluate", tmp_path / "net.pt", *asked)
        assert ("may have seen some" in err) == (count == 70)
        out = tmp_path / str(count)
        assert cli("run", tmp_path / "net.pt", "--out", out, *asked[:2], *QUICK)[0] == 0
        assert json.loads((out / "report.json").read_text())["data"]["validation_held_out"] == (
            True if count == 60 else None
        )
        for file in ("model.onnx", "slim.safetensors"):
            _, _, err = cli("evaluate", out / file, *asked)
            assert ("may have seen some" in err) == (count == 70)
    # of the smaller set, training saw what a split of the larger one did not hold back
    again = ["--data", tmp_path / "60.npz", "--out", tmp_path / "again", *QUICK]
    assert cli("run", tmp_path / "70" / "slim.safetensors", *again)[0] == 0
    assert json.loads((tmp_path / "again" / "report.json").read_text())["data"]["validation_held_out"] is None


def test_files_say_the_order_of_the_classes(cli, tmp_path):
    generator = np.random.default_rng(0)
    given = {"images": generator.integers(0, 256, (60, 8, 8), dtype=np.uint8), "labels": np.arange(60) % 10}
    for name, classes in (("one", "abcdefghij"), ("other", "bacdefghij")):
        np.savez(tmp_path / f"{name}.npz", classes=np.array(list(classes)), **given)
    data = ["--data", tmp_path / "one.npz"]
    assert cli("train", "digits", *data, "--out", tmp_path / "net.pt", "--epochs", "1")[0] == 0
    assert cli("run", tmp_path / "net.pt", *data, "--out", tmp_path / "slim", *QUICK)[0] == 0
    for file in ("net.pt", "slim/slim.safetensors", "slim/model.onnx"):
        for name, code in (("one", 0), ("other", 1)):
            asked = ["--data", tmp_path / f"{name}.npz", "--split", "validation"]
            found, _, err = cli("evaluate", tmp_path / file, *asked)
            assert (found, "has class 'b' as number 0" in err) == (code, bool(code))


def test_evaluate_builds_a_slim_file_with_the_arguments_given(cli, tmp_path, zoo):
    export_from_python(zoo, tmp_path, load(zoo / "digits.pt").input)
    code = "from vbdcompress.architectures import build_architecture\ndef build(kind):\n"
    (tmp_path / "mine.py").write_text(code + "    return build_architecture(kind)\n")
    given = ["--arch", f"{tmp_path / 'mine.py'}:build", "--arch-arg", "kind=digits", "--data", "digits"]
    assert cli("evaluate", tmp_path / "slim.safetensors", *given)[0] == 0
    assert cli("run", tmp_path / "slim.safetensors", "--out", tmp_path / "again", *given, *QUICK)[0] == 0
    again = load(tmp_path / "again" / "slim.safetensors", arch=given[1])
    assert (again.architecture, again.arguments) == (given[1], {"kind": "digits"})


@pytest.mark.parametrize("command", [["evaluate", "ZOO"], ["train", "lenet5", "--out", "OUT"]])
def test_a_network_that_fails_on_the_data_is_one_clear_paragraph(cli, zoo, tmp_path, command):
    np.savez(tmp_path / "set.npz", images=np.zeros((60, 13, 13), np.uint8), labels=np.arange(60) % 10)
    given = {"ZOO": zoo / "digits.pt", "OUT": tmp_path / "net.pt"}
    data = ["--data", tmp_path / "set.npz", "--mean", "0", "--std", "1"]
    extra = ["--split", "validation"] if command[0] == "evaluate" else []
    code, _, err = cli(*[given.get(item, item) for item in command], *data, *extra)
    assert code == 1
    assert "fails on" in err
    assert "Traceback" not in err


OUTPUTS = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(64, 10)

    def forward(self, x, *rest):
        y = self.head(x.flatten(1))
        if self.kind == "map":
            return y[:, :, None, None]
        if self.kind == "one":
            return y.mean(0, keepdim=True)
        return {"dict": {"logits": y}, "pair": (y, y), "good": y}[self.kind]


class Two(Network):
    def forward(self, x, other):
        return super().forward(x + other)


def build(kind):
    return Two("good") if kind == "two" else Network(kind)
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("map", r"gives a tensor of shape \[\d+, 10, 1, 1\] for \d+ examples, allowed are logits"),
        ("one", r"gives a tensor of shape \[1, 10\] for \d+ examples, allowed are logits \[batch, classes\]"),
        ("dict", r"gives a dict, allowed are logits \[batch, classes\]"),
        ("pair", r"gives a (tuple|list) of 2, allowed are logits \[batch, classes\]"),
        ("two", r"missing 1 required positional argument|takes 2 inputs"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "onnx"])
def test_evaluate_refuses_what_gives_no_logits(cli, tmp_path, kind, message, suffix):
    (tmp_path / "mine.py").write_text(OUTPUTS)
    names = {}
    exec(OUTPUTS, names)
    model, file = names["build"](kind), tmp_path / f"net.{suffix}"
    given = ["--data", "digits", "--mean", "0", "--std", "1"]
    if suffix == "pt":
        torch.save(model.state_dict(), file)
        given += ["--arch", f"{tmp_path / 'mine.py'}:build", "--arch-arg", f"kind={kind}"]
    elif kind == "dict":
        pytest.skip("ONNX files give no dict")
    else:
        samples = torch.randn(4, 1, 8, 8)
        export_onnx(model, file, (samples, samples) if kind == "two" else samples)
    code, out, err = cli("evaluate", file, *given)
    assert (code, out) == (1, "")
    assert re.search(message, " ".join(err.split()))


def test_evaluate_ignores_another_program_s_report(cli, finished, tmp_path):
    told = json.loads((finished / "report.json").read_text())["error"]
    (tmp_path / "model.onnx").write_bytes((finished / "model.onnx").read_bytes())
    (tmp_path / "report.json").write_text('{"tool": "another"}')
    code, out, err = cli("evaluate", tmp_path, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["error"] == pytest.approx(told, abs=1e-9)
    # a file that says nothing of itself needs it
    silent = onnx.load(finished / "model.onnx")
    del silent.metadata_props[:]
    onnx.save(silent, tmp_path / "model.onnx")
    code, _, err = cli("evaluate", tmp_path)
    assert (code, "is not a report of vbdcompress" in err) == (1, True)
