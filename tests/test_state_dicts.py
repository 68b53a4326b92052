"""Weights in files of another age, or with other names before theirs."""

from pathlib import Path

import pytest
import torch
import torchvision

from vbdcompress.loading import load


def test_load_takes_weights_from_before_batch_norm_counted_its_batches(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pt")
    loaded = load(tmp_path / "old.pt", arch="torchvision:resnet18", arguments={"num_classes": 4})
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_tells_modules_of_which_version_their_weights_are(prefix: str, tmp_path: Path) -> None:
    model = torchvision.models.mnasnet0_5(num_classes=3)
    state = model.state_dict()
    for key in list(state) if prefix else ():
        state[prefix + key] = state.pop(key)
    torch.save(state, tmp_path / "mnasnet.pt")
    loaded = load(tmp_path / "mnasnet.pt", arch="torchvision:mnasnet0_5", arguments={"num_classes": 3})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(x), model.eval()(x))
