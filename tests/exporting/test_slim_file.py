"""slim.safetensors: what is loaded equals what was saved, and trains on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vbdcompress.architectures import build_architecture
from vbdcompress.conversion import convert
from vbdcompress.errors import LoadError, SlimError
from vbdcompress.exporting.slim_file import SlimFile, load_slim, save_slim
from vbdcompress.records import InputSpec
from vbdcompress.slimming import slim
from vbdcompress.surgery.slice import LayerCut, RemovalPlan, apply_plan_
from vbdcompress.vbd.posterior import find_posteriors

SPEC = InputSpec((1, 28, 28), (0.1,), (0.3,))


def slimmed_lenet(mode, **options):
    torch.manual_seed(0)
    model = build_architecture("lenet5")
    converted = convert(model, torch.randn(2, 1, 28, 28), mode, prune_inputs=True, **options)
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data[torch.rand(posterior.theta.shape) < 0.5] = 30.0
        posterior.theta.data.mul_(0.9)
    return slim(converted, 3.0)


@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_load_slim_equals_what_was_saved_and_trains_on(mode, tmp_path):
    slimmed = slimmed_lenet(mode)
    path = tmp_path / "slim.safetensors"
    save_slim(path, slimmed.model, SlimFile((slimmed.plan,), "lenet5", {}, "mnist", SPEC))
    loaded = load_slim(path)
    batch = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(batch), slimmed.model(batch))
    loaded.train()(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_save_slim_packs_zeros(tmp_path):
    slimmed = slimmed_lenet("weights")
    path = tmp_path / "slim.safetensors"
    save_slim(path, slimmed.model, SlimFile((slimmed.plan,), "lenet5", {}, "mnist", SPEC))
    dense = 4 * sum(parameter.numel() for parameter in slimmed.model.parameters())
    assert path.stat().st_size < 0.6 * dense


def test_load_slim_cuts_the_user_s_own_network(tmp_path):
    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    converted = convert(build(), torch.randn(2, 6), "channels")
    gate = find_posteriors(converted.model)[0]
    gate.log_sigma2.data[:5] = 30.0
    slimmed = slim(converted, 3.0)
    path = tmp_path / "slim.safetensors"
    save_slim(path, slimmed.model, SlimFile((slimmed.plan,), None, {}, None, InputSpec((6,))))
    with pytest.raises(LoadError, match="does not name its architecture"):
        load_slim(path)
    for network in (build(), nn.DataParallel(build())):
        loaded = load_slim(path, network)
        assert loaded[0].out_features == 3
        assert torch.equal(loaded(torch.ones(1, 6)), slimmed.model(torch.ones(1, 6)))
    with pytest.raises(LoadError, match="does not fit the network"):
        load_slim(path, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 3)))
    with pytest.raises(LoadError, match="does not fit the network"):
        load_slim(path, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))


def test_a_network_that_was_cut_twice_is_loaded_from_both_files(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    paths, network = (tmp_path / "first.safetensors", tmp_path / "second.safetensors"), build()
    for path, mode in zip(paths, ("channels", "weights"), strict=True):
        converted = convert(network, torch.randn(2, 6), mode)
        if mode == "channels":  # the second leaves all units, and so one size for the file's tensors
            find_posteriors(converted.model)[0].log_sigma2.data[:2] = 30.0
        slimmed = slim(converted, 3.0)
        network = slimmed.model
        save_slim(path, network, SlimFile((slimmed.plan,), None, {}, None, InputSpec((6,))))
    with pytest.raises(LoadError, match=r"(?s)does not fit.*load_slim\(path_of_the_first"):
        load_slim(paths[1], model=build())
    loaded = load_slim(paths[1], model=load_slim(paths[0], model=build()))
    assert torch.equal(loaded(torch.ones(2, 6)), network(torch.ones(2, 6)))


def test_load_slim_does_not_build_what_a_file_names(tmp_path):
    path = tmp_path / "slim.safetensors"
    slimmed = slimmed_lenet("channels")
    save_slim(path, slimmed.model, SlimFile((slimmed.plan,), "os:system", {"command": "true"}, None, SPEC))
    with pytest.raises(LoadError, match="named inside the file"):
        load_slim(path)


@pytest.mark.parametrize("damage", ["cut", "foreign", "version"])
def test_load_slim_refuses_a_damaged_file(damage, tmp_path):
    path = tmp_path / "slim.safetensors"
    slimmed = slimmed_lenet("channels")
    save_slim(path, slimmed.model, SlimFile((slimmed.plan,), "lenet5", {}, "mnist", SPEC))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata())
        content = json.loads(metadata["vbdcompress.slim"]) | {"version": 99}
        metadata = {"vbdcompress.slim": json.dumps(content)} if damage == "version" else {"made by": "me"}
        save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(LoadError, match=r"can't be read|expected"):
        load_slim(path)


@pytest.mark.parametrize("damage", ["values", "mask", "shape", "negative", "arguments"])
def test_load_slim_refuses_parts_that_do_not_fit_each_other(damage, tmp_path):
    path = tmp_path / "slim.safetensors"
    slimmed = slimmed_lenet("weights")
    save_slim(path, slimmed.model, SlimFile((slimmed.plan,), "lenet5", {}, "mnist", SPEC))
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["vbdcompress.slim"])
    name = next(iter(content["sparse_shapes"]))
    if damage in ("values", "mask"):
        tensors[f"{name}.{damage}"] = tensors[f"{name}.{damage}"][1:].clone()
    elif damage == "arguments":
        content["arguments"] = 1.5
    else:
        content["sparse_shapes"][name][0] *= 1000 if damage == "shape" else -1
    save_file(tensors, path, metadata={"vbdcompress.slim": json.dumps(content)})
    with pytest.raises(LoadError):
        load_slim(path)


def test_plan_survives_json(tmp_path):
    plan = slimmed_lenet("channels").plan
    plan = replace(plan, cuts={**plan.cuts, "none_left": LayerCut(inputs=())})
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == plan


class Versioned(nn.Sequential):
    """Refuses a state without the version of its class, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != self._version:
            raise ValueError("no version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_load_slim_tells_modules_their_version(tmp_path):
    model = Versioned(nn.Linear(4, 3))
    save_slim(tmp_path / "slim.safetensors", model, SlimFile((), None, {}, None, InputSpec((4,))))
    loaded = load_slim(tmp_path / "slim.safetensors", Versioned(nn.Linear(4, 3)))
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_names_that_end_like_packed_ones_are_kept_apart(tmp_path):
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.zeros(40))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.mem = Memory()

    save_slim(tmp_path / "slim.safetensors", Network(), SlimFile((), None, {}, None, InputSpec((4,))))
    assert load_slim(tmp_path / "slim.safetensors", Network()).mem.values.count_nonzero() == 0


@pytest.mark.parametrize(
    "cut",
    [
        {"inputs": ["a"]},
        {"inputs": 5},
        {"outputs": [1.5]},
        {"outputs": [-1]},
        {"attributes": {"in_features": "3"}},
        {"attributes": [1]},
        {"parameters": {"weight": [0]}},
        {"parameters": 3},
        {"strange": 1},
    ],
)
def test_a_malformed_plan_is_named(cut):
    with pytest.raises(SlimError, match="removal plan: is malformed"):
        RemovalPlan.from_json({"fc": cut})


@pytest.mark.parametrize("name", ["__class__", "forward", "training", "nothing"])
def test_a_plan_sets_numbers_that_a_module_keeps_and_nothing_else(name):
    plan = RemovalPlan.from_json({"0": {"attributes": {name: 3}}})
    with pytest.raises(SlimError, match=f"keeps no number '{name}'"):
        apply_plan_(nn.Sequential(nn.Linear(4, 3)), plan)


def test_a_plan_sets_numbers_of_numpy_and_floats(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].heads, model[0].width = np.int64(4), 4.0
    apply_plan_(model, RemovalPlan.from_json({"0": {"attributes": {"heads": 3, "width": 3}}}))
    assert (model[0].heads, model[0].width) == (3, 3)
