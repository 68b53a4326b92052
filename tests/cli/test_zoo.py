"""vbdcompress zoo: a folder of networks, and of what else lies there."""

import shutil

import torch
from torch import nn


def test_zoo_says_why_a_file_is_no_checkpoint_and_goes_on(cli, zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    shutil.copy(zoo / "digits.pt", tmp_path / "digits.pt")
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "bare.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "notes.pt").write_text("no network")
    code, out, err = cli("zoo", tmp_path)
    assert (code, err) == (0, "")
    rows = {line.split()[1]: line for line in out.splitlines() if ".pt" in line}
    assert list(rows) == ["bare.pt", "digits.pt", "notes.pt", "whole.pt"]
    assert "13,754" in rows["digits.pt"]
    assert "holds 1 tensors but does not name its architecture" in rows["bare.pt"]
    assert "is damaged, or no file of torch's" in rows["notes.pt"]
    assert "is a pickle that would run code when read" in rows["whole.pt"]
