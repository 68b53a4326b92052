"""load: safe by default, and a clear word on what does not fit."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from vbdcompress.architectures import build_architecture
from vbdcompress.errors import LoadError
from vbdcompress.loading import Loaded, load, save_checkpoint
from vbdcompress.records import InputSpec

CALLED = []


class Evil:
    def __reduce__(self):
        return CALLED.append, (1,)


class Failing:
    """What can't be made from a pickle, as DistributedDataParallel without its processes."""

    def __setstate__(self, state):
        raise ValueError("Default process group has not been initialized")


def save(path, content):
    torch.save(content, path)
    return path


def test_save_checkpoint_then_load_gives_everything_back(tmp_path):
    model = build_architecture("lenet5", {"hidden": 30}).eval()
    spec = InputSpec((1, 28, 28), (0.13,), (0.31,))
    path = tmp_path / "net.pt"
    save_checkpoint(
        path,
        Loaded(model, "lenet5", {"hidden": 30}, "mnist", spec, {"fraction": 0.1, "seed": 3}, {"lr": 1e-3}),
    )
    loaded = load(path)
    batch = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded.model(batch), model(batch))
    assert (loaded.architecture, loaded.data, loaded.input) == ("lenet5", "mnist", spec)
    assert (loaded.validation, loaded.training) == ({"fraction": 0.1, "seed": 3}, {"lr": 1e-3})


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net.", "model._orig_mod."])
def test_load_finds_a_state_dict(tmp_path, wrap, prefix):
    model = build_architecture("digits").eval()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    loaded = load(save(tmp_path / "net.pt", wrap(state)), arch="digits")
    batch = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.model(batch), model(batch))


TIED = """
from torch import nn


def build():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight  # as language models do
    return model
"""


def test_load_takes_weights_in_safetensors(tmp_path):
    (tmp_path / "tied.py").write_text(TIED)
    path, arch, weight = tmp_path / "tied.safetensors", f"{tmp_path}/tied.py:build", torch.randn(7, 4)
    for name in ("0.weight", "1.weight"):  # of tied ones the format holds one
        save_file({name: weight}, path)
        found = load(path, arch=arch).model
        assert found[1].weight is found[0].weight
        assert torch.equal(found[1].weight, weight)
    for wrapped in ({"module.1.weight": weight}, {"net.1.weight": weight, "loss.weight": torch.ones(3)}):
        save_file(wrapped, path)
        assert torch.equal(load(path, arch=arch).model[0].weight, weight)
    save_file({"0.weight": weight}, path)
    with pytest.raises(LoadError, match="holds 1 tensors but does not name its architecture"):
        load(path)
    save_file({"other": weight}, path)
    with pytest.raises(LoadError, match=r"missing: 0\.weight, 1\.weight; not known: other"):
        load(path, arch=arch)


EXTRA = """
from torch import nn


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def build():
    return WithState(2, 2)
"""


def test_load_says_that_extra_state_is_missing(tmp_path):
    (tmp_path / "extra.py").write_text(EXTRA)
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "extra.pt")
    with pytest.raises(LoadError, match="missing: _extra_state"):
        load(tmp_path / "extra.pt", arch=f"{tmp_path}/extra.py:build")


def test_load_says_that_onnx_is_not_taken(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(LoadError, match=r"an ONNX file, which can't be trained"):
        load(tmp_path / "model.onnx")


def test_load_takes_the_network_out_of_a_training_class(tmp_path):
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.loss = build_architecture("digits"), nn.CrossEntropyLoss(torch.ones(10))

    training = Training().eval()
    path = save(tmp_path / "net.ckpt", {"epoch": 3, "state_dict": training.state_dict()})
    batch = torch.randn(2, 1, 8, 8)
    assert torch.equal(load(path, arch="digits").model(batch), training.body(batch))
    training.average = build_architecture("digits")  # whose weights are meant?
    save(path, training.state_dict())
    with pytest.raises(LoadError, match="not known: body"):
        load(path, arch="digits")


def test_load_builds_torchvision_and_the_user_s_file(tmp_path):
    model = torchvision.models.squeezenet1_1(num_classes=7)
    path = save(tmp_path / "net.pt", model.state_dict())
    loaded = load(path, arch="torchvision:squeezenet1_1", arguments={"num_classes": 7})
    assert loaded.architecture == "torchvision:squeezenet1_1"
    code = tmp_path / "mine.py"
    code.write_text("from torch import nn\ndef build(width=2):\n    return nn.Linear(3, width)\n")
    path = save(tmp_path / "own.pt", nn.Linear(3, 5).state_dict())
    assert load(path, arch=f"{code}:build", arguments={"width": 5}).model.out_features == 5


def test_load_refuses_to_run_a_pickle_and_runs_nothing(tmp_path):
    CALLED.clear()
    path = save(tmp_path / "evil.pt", {"state_dict": Evil()})
    with pytest.raises(LoadError, match=r"would run code when read.*was not read"):
        load(path, arch="digits")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(LoadError):
        load(tmp_path / "plain.pt", arch="digits")
    assert CALLED == []


def test_load_reads_a_pickled_module_only_when_told_to(tmp_path):
    path = save(tmp_path / "whole.pt", nn.Linear(3, 2))
    with pytest.raises(LoadError, match="--unsafe-pickle"):
        load(path)
    assert load(path, unsafe_pickle=True).model.out_features == 2


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda model: nn.DataParallel(torch.compile(model))]
)
def test_load_takes_a_pickled_network_out_of_its_wrappers(tmp_path, wrap):
    model = nn.Sequential(nn.Linear(3, 2))
    loaded = load(save(tmp_path / "whole.pt", wrap(model)), unsafe_pickle=True).model
    assert list(loaded.state_dict()) == ["0.weight", "0.bias"]
    assert type(loaded) is nn.Sequential
    batch = torch.randn(2, 3)
    assert torch.equal(loaded(batch), model(batch))


@pytest.mark.parametrize("unsafe", [False, True])
def test_load_says_that_torchscript_is_not_taken(tmp_path, unsafe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.randn(1, 3)), tmp_path / "script.pt")
    with pytest.raises(LoadError, match=r"is TorchScript.*can't be changed(?s:.*)torch\.export") as caught:
        load(tmp_path / "script.pt", unsafe_pickle=unsafe)
    assert "weights_only" not in str(caught.value)


def test_load_names_a_pickle_that_fails(tmp_path):
    failing = Failing()
    failing.value = 1
    with pytest.raises(LoadError, match=r"can't be unpickled: Default process group"):
        load(save(tmp_path / "whole.pt", {"state_dict": failing}), unsafe_pickle=True)


def test_load_does_not_import_what_a_checkpoint_names(tmp_path):
    content = {
        "format": "vbdcompress.checkpoint",
        "version": 1,
        "arch": "os:system",
        "arguments": {"command": "touch " + str(tmp_path / "ran")},
        "state_dict": {},
    }
    with pytest.raises(LoadError, match="named inside the file"):
        load(save(tmp_path / "net.pt", content))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv1.weight": torch.zeros(16, 1, 3, 3)}, r"missing: bn1.weight.*and \d+ more"),
        (
            {"conv1.weight": torch.zeros(2, 2)},
            r"of another shape: conv1.weight is \(2, 2\), should be \(16, 1, 3, 3\)",
        ),
        ({"stem.weight": torch.zeros(2)}, "not known: stem.weight"),
        ({"epoch": 3, "loss": 0.1}, "holds a dict with keys epoch, loss"),
        (torch.zeros(3), "holds a Tensor"),
        ({"format": "vbdcompress.checkpoint", "version": 7}, "version 7, expected 1"),
        ({"format": "vbdcompress.checkpoint", "version": 1, "arch": "digits"}, "without state_dict"),
    ],
)
def test_load_says_what_does_not_fit(tmp_path, content, message):
    with pytest.raises(LoadError, match=message):
        load(save(tmp_path / "net.pt", content), arch="digits")


def test_load_says_what_is_missing_or_damaged(tmp_path):
    path = save(tmp_path / "lenet5.pt", build_architecture("digits").state_dict())
    with pytest.raises(LoadError, match=r"does not exist.*Did you mean .*lenet5\.pt"):
        load(tmp_path / "lenet_5.pt")
    with pytest.raises(LoadError, match=r"is a folder.*\n.*\.safetensors"):
        load(tmp_path)
    with pytest.raises(LoadError, match="does not name its architecture"):
        load(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(LoadError, match="cut short"):
        load(path, arch="digits")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(LoadError, match="cut short: EOFError"):
        load(tmp_path / "empty.pt")
    (tmp_path / "program.pt2").write_bytes(b"")
    with pytest.raises(LoadError, match=r"torch\.export program"):
        load(tmp_path / "program.pt2")


def linear_state() -> dict[Any, Any]:
    return {"weight": torch.randn(3, 4), "bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weight": torch.randn(3, 4).to_sparse()}, "'weight' is .*torch.sparse_coo"),
        ({"weight": torch.empty(3, 4, device="meta")}, "'weight' is .*on meta"),
        ({7: torch.zeros(1)}, "no weight of a network: 7 is"),
        ({"weight": torch.randn(3, 4, dtype=torch.complex64)}, "complex, or should be: weight"),
    ],
)
def test_load_names_tensors_that_no_network_takes(tmp_path: Path, change: Any, told: str) -> None:
    torch.save(linear_state() | change, tmp_path / "odd.pt")
    with pytest.raises(LoadError, match=told):
        load(tmp_path / "odd.pt", arch="torch.nn:Linear", arguments={"in_features": 4, "out_features": 3})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"state_dict": [1]}, "no dict of names and tensors"),
        ({"state_dict": {"weight": 3}}, "no dict of names and tensors"),
        ({"data": 5}, "names its data set 5"),
        ({"arch": ["lenet5"]}, "allowed are a name and a dict"),
    ],
)
def test_load_refuses_entries_of_another_kind(tmp_path: Path, zoo: Path, change: Any, told: str) -> None:
    content = torch.load(zoo / "digits.pt")
    torch.save(content | change, tmp_path / "odd.pt")
    with pytest.raises(LoadError, match=told):
        load(tmp_path / "odd.pt")
