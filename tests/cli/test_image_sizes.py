"""The size that a folder's images are read at: what the network's file says, or --image-size."""

import json

import numpy as np
import pytest
from PIL import Image

from vbdcompress.architectures import build_architecture
from vbdcompress.loading import Loaded, save_checkpoint
from vbdcompress.records import InputSpec

# Answers the first class where images are 16 by 16, else the second
NETWORK = """
import torch
from torch import nn

class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.answer = nn.Parameter(torch.eye(2))

    def forward(self, x):
        return self.answer[int(x.shape[2:] != (16, 16))].repeat(len(x), 1)

def build():
    return Sized()
"""


@pytest.fixture
def sized(tmp_path):
    """Makes a checkpoint of a network for 16 by 16, and names a folder of images of 48 by 48."""
    for part, cats in (("train", 3), ("test", 3)):
        for name, count in (("cat", cats), ("dog", 1)):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (48, 48), (60 * number, 90, 0))
                image.save(tmp_path / "images" / part / name / f"{number}.png")
    (tmp_path / "net.py").write_text(NETWORK)
    arch = f"{tmp_path / 'net.py'}:build"

    def make(mean):
        spec = InputSpec((3, 16, 16), mean, mean)
        loaded = Loaded(build_architecture(arch, trusted=True), arch, {}, None, spec)
        save_checkpoint(tmp_path / "net.pt", loaded)
        return [tmp_path / "net.pt", "--arch", arch, "--data", tmp_path / "images", "--json"]

    return make


@pytest.mark.parametrize("mean", [(), (0.4, 0.4, 0.4)])
@pytest.mark.parametrize("given", [[], ["--mean", "0.5", "--std", "0.5"]])
def test_evaluate_reads_a_folder_at_the_size_of_the_file_whoever_says_the_mean(cli, sized, mean, given):
    code, printed, err = cli("evaluate", *sized(mean), *given)
    assert (code, json.loads(printed)["error"]) == (0, 25.0), err  # the dog, of the four
    assert ("does not say how its inputs were normalised" in err) == (not mean and not given)
    _, printed, _ = cli("evaluate", *sized(mean), *given, "--image-size", "48")
    assert json.loads(printed)["error"] == 75.0


@pytest.mark.parametrize(
    "command", [["evaluate", "ZOO"], ["run", "ZOO"], ["train", "digits", "--out", "new.pt"]]
)
@pytest.mark.parametrize("data", ["digits", "set.npz"])
def test_an_image_size_is_refused_where_there_is_no_folder(cli, zoo, tmp_path, monkeypatch, command, data):
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.arange(20) % 10)
    (tmp_path / "digits").mkdir()  # the set of that name is read all the same
    asked = [zoo / "digits.pt" if item == "ZOO" else item for item in command]
    code, _, err = cli(*asked, "--data", data, "--image-size", "32")
    assert (code, f"data set '{data}': is no folder" in err, "--image-size" in err) == (2, True, True)


def test_an_image_size_counts_for_a_folder_of_validation_data(cli, sized, tmp_path):
    images, labels = np.zeros((20, 3, 16, 16), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "set.npz", images=images, labels=labels, classes=np.array(["cat", "dog"]))
    asked = [*sized((0.4,)), "--validation", tmp_path / "images" / "test"]
    asked[asked.index("--data") + 1] = tmp_path / "set.npz"
    code, _, err = cli("evaluate", *asked)
    assert (code, "images are (3, 48, 48), the training part's are (3, 16, 16)" in err) == (1, True)
    code, printed, err = cli("evaluate", *asked, "--image-size", "16")
    assert (code, json.loads(printed)["error"]) == (0, 25.0), err
