"""vbdcompress inspect: what it says of a network before anything is done to it."""

import json

import pytest
import torch

ENCODER = """
import pytest
import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_of_a_long_name = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layer_of_a_long_name(x).mean(1))


def build():
    return Encoder()
"""


def test_inspect_prints_layers_and_touches_nothing(cli, zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("inspect", zoo / "digits.pt", "--prune-inputs", "--json")
    assert code == 0
    content = json.loads(out)
    assert {row["name"] for row in content["table"] if row["action"] == "converted"} == {
        "conv2",
        "fc1",
        "fc2",
    }
    assert content["size"]["parameters"] == 13754
    assert "fc1 (inputs)" in {group["name"] for group in content["groups"]}
    of_both = json.loads(cli("inspect", zoo / "digits.pt", "--prune-inputs", "--json", "--mode", "both")[1])
    assert of_both == content  # the round of channels comes first
    code, out, _ = cli("inspect", zoo / "digits.pt")
    assert code == 0
    assert "conv2" in out
    assert not list(tmp_path.iterdir())


def inspect_encoder(cli, folder, *flags):
    (folder / "encoder.py").write_text(ENCODER)
    names = {}
    exec(ENCODER, names)
    torch.save(names["build"]().state_dict(), folder / "encoder.pt")
    arch = f"{folder / 'encoder.py'}:build"
    code, out, err = cli("inspect", folder / "encoder.pt", "--arch", arch, "--input-shape", "9,16", *flags)
    assert code == 0, err
    return out


def test_inspect_counts_all_channels_of_a_group_that_stays_whole(cli, tmp_path):
    groups = json.loads(inspect_encoder(cli, tmp_path, "--json"))["groups"]
    sizes = {group["name"].rpartition(".")[2]: (group["size"], group["whole_because"]) for group in groups}
    assert sizes["q"] == (4, None)  # heads
    assert sizes["linear1"] == (32, None)
    assert sizes["out"][0] == 16  # the input is added to them
    assert sizes["out"][1].startswith("the network can't run without some of its channels")


def test_inspect_says_the_macs_of_attention_s_own_layers(cli, tmp_path):
    table = json.loads(inspect_encoder(cli, tmp_path, "--json"))["table"]
    macs = {row["name"].rpartition(".")[2]: row["macs"] for row in table}
    assert [macs[name] for name in ("q", "k", "v", "out")] == 4 * [9 * 16 * 16]
    assert macs["linear1"] == 9 * 16 * 32


def test_inspect_cuts_no_name_short(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = inspect_encoder(cli, tmp_path).splitlines()
    first = lines.index(next(line for line in lines if line.startswith("layer ")))
    width = lines[first].index("kind")
    column = "".join(
        line[:width].strip() for line in lines[first + 1 : lines.index("Channel groups".ljust(60))]
    )
    assert "layer_of_a_long_name.self_attn.out" in column
    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)


@pytest.mark.parametrize("shape", ["1,-8,8", "0", "1x0x8", "1,,8", ""])
def test_inspect_refuses_sizes_that_there_are_not(cli, zoo, shape):
    code, out, err = cli("inspect", zoo / "digits.pt", "--input-shape", shape)
    assert (code, out) == (2, "")
    assert f"--input-shape '{shape}' is not like 3,32,32" in err
