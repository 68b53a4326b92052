"""zoo/cifar/carry.py: what is packed on one machine is there on the other, and goes on."""

import os
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from vbdcompress.architectures import build_architecture
from vbdcompress.checkpoints import FitCheckpoint
from vbdcompress.config import FitConfig
from vbdcompress.data import load_data
from vbdcompress.fitting import fit


def test_install_puts_what_is_finished_into_the_zoo(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    carry, work, root = script("carry"), tmp_path / "work", tmp_path / "root"
    made = {
        "zoo/vgg_cifar.pt": "zoo/vgg_cifar.pt",
        "results/vgg_cifar_channels/vd-0.json": "zoo/cifar/results/vgg_cifar_channels/vd-0.json",
        "results/step_cost_cuda.json": "zoo/benchmarks/step_cost_cuda.json",
        "runs/vgg_cifar_channels-vbd-0/model.onnx": "exports/vgg_cifar_channels/model.onnx",
        "runs/vgg_cifar_channels-vbd-1/model.onnx": None,
        "runs/resnet20_channels-vbd-0/.state/run.json": None,
    }
    for name in made:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    (root / "zoo" / "benchmarks").mkdir(parents=True)
    for name, place in {"ROOT": root, "ZOO": root / "zoo", "RESULTS": root / "zoo/cifar/results"}.items():
        monkeypatch.setattr(carry, name, place)
    done = CliRunner().invoke(carry.main, ["install", str(work)])
    assert done.exit_code == 0, done.output
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert files == sorted(target for target in made.values() if target)


def test_pack_and_unpack_give_the_same_files(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    carry = script("carry")
    monkeypatch.setattr(carry, "PART", 100_000)
    monkeypatch.setattr(carry, "EXACT", 50_000)
    work = tmp_path / "work"
    made = {
        "results/row/vbd-0.json": b"{}",
        "runs/row-vbd-0/model.onnx": os.urandom(150_000),
        "runs/row-vd-0/.state/run.json": b"{1}",
        "dense/.training/net.pt/run.json": b"{2}",
        "zoo/net.pt": os.urandom(80_000),
        "inductor/code.py": b"no",
    }
    for name, content in made.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)
    weight, statistics = torch.randn(200, 200), torch.randn(20)
    state = {
        "model": {"w": weight, "b": statistics},
        "optimizer": {"state": {0: weight}, "param_groups": [1]},
    }
    torch.save(state, work / "runs/row-vd-0/.state/fit.ckpt")
    assert list(carry.pack(work, tmp_path / "out")) == []
    assert all(part.stat().st_size <= 100_000 for part in (tmp_path / "out").iterdir())
    carry.unpack(tmp_path / "out", tmp_path / "there")
    for name, content in made.items():
        path = tmp_path / "there" / name
        assert path.read_bytes() == content if not name.startswith("inductor") else not path.exists()
    found = torch.load(tmp_path / "there/runs/row-vd-0/.state/fit.ckpt", weights_only=True)
    assert torch.equal(found["model"]["w"], weight.bfloat16())
    assert torch.equal(found["model"]["b"], statistics)
    assert found["optimizer"] == {"state": {}, "param_groups": [1]}
    # what came that way, and is as it was, does not go back
    (tmp_path / "there/results/row/vd-0.json").write_bytes(b"[]")
    list(carry.pack(tmp_path / "there", tmp_path / "back"))
    carry.unpack(tmp_path / "back", tmp_path / "again")
    files = [path.name for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert sorted(files) == [".carried.json", "vd-0.json"]
    list(carry.pack(tmp_path / "there", tmp_path / "next", everything=True))
    carry.unpack(tmp_path / "next", tmp_path / "third")
    assert (tmp_path / "third/zoo/net.pt").read_bytes() == made["zoo/net.pt"]
    # but to where it came from: parts there are replaced
    list(carry.pack(tmp_path / "there", tmp_path / "out"))
    carry.unpack(tmp_path / "out", tmp_path / "fourth")
    assert (tmp_path / "fourth/zoo/net.pt").read_bytes() == made["zoo/net.pt"]
    assert (tmp_path / "fourth/results/row/vd-0.json").exists()


def test_pack_tells_what_does_not_fit(script: Any, tmp_path: Path) -> None:
    for name in ("results/row/vbd-0.json", "zoo/net.pt"):
        (tmp_path / "work" / name).parent.mkdir(parents=True)
        (tmp_path / "work" / name).write_bytes(os.urandom(5000))
    told = list(script("carry").pack(tmp_path / "work", tmp_path / "out", limit=30_000))
    assert told == ["left behind: zoo/net.pt (5,000 bytes)"]


def test_a_network_goes_on_from_a_rounded_state(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    carry = script("carry")
    data = load_data("digits")
    for optimizer in ("adam", "sgd"):
        checkpoint = FitCheckpoint(tmp_path / f"{optimizer}.ckpt", resume=True)
        config = FitConfig(epochs=1, device="cpu", optimizer=optimizer, lr=0.01)
        model = build_architecture("digits")
        fit(model, data.train_batches(100, 0), config, checkpoint=checkpoint)
        with monkeypatch.context() as patch:
            patch.setattr(carry, "EXACT", 0)
            checkpoint.path.write_bytes(carry._state_bytes(checkpoint.path))
        content = torch.load(checkpoint.path, weights_only=True)
        content["config"]["epochs"] = 2
        torch.save(content, checkpoint.path)
        longer = config.model_copy(update={"epochs": 2})
        rows = fit(
            build_architecture("digits"), data.train_batches(100, 0), longer, checkpoint=checkpoint
        ).epochs
        assert len(rows) == 2
        assert rows[1].nll < rows[0].nll


def test_pack_leaves_out_what_vanishes_meanwhile(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    carry, work = script("carry"), tmp_path / "work"
    for name in ("one", "two"):
        (work / "results" / name).mkdir(parents=True)
        (work / "results" / name / "vbd-0.json").write_text(name)
    files = carry._files

    def vanishing(folder: Path) -> Any:
        for path in list(files(folder)):
            if path.parent.name == "one":
                path.unlink()
            yield path

    monkeypatch.setattr(carry, "_files", vanishing)
    assert list(carry.pack(work, tmp_path / "out")) == []
    carry.unpack(tmp_path / "out", tmp_path / "there")
    assert sorted(path.parent.name for path in (tmp_path / "there").rglob("vbd-0.json")) == ["two"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["carry.00"]
