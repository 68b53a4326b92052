"""compress: from the user's own network and loader to files, in few epochs on real digits."""

import json
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import vbdcompress
from vbdcompress.architectures import build_architecture
from vbdcompress.errors import ConfigError, DataError, SlimError
from vbdcompress.evaluation import measure_error
from vbdcompress.loading import load
from vbdcompress.pipeline import compress


@pytest.fixture(scope="module")
def trained(zoo):
    return load(zoo / "digits.pt")


@pytest.fixture(scope="module")
def data(trained):
    split = trained.validation
    return vbdcompress.load_data(
        "digits",
        normalisation=trained.input,
        validation_fraction=split["fraction"],
        validation_seed=split["seed"],
    )


def loader_of(examples, batch_size=48, shuffle=True):
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(examples.inputs, examples.labels)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator)


@pytest.fixture(scope="module")
def result(trained, data):
    torch.manual_seed(0)
    return compress(
        trained.model,
        loader_of(data.train),
        validation=loader_of(data.validation, shuffle=False),
        test=loader_of(data.test, shuffle=False),
        input=data.input,
        mode="both",
        epochs=6,
        finetune_epochs=2,
        prune_inputs=True,
        beta=4.0,
        max_error_increase=8.0,
    )


def test_compress_leaves_the_user_s_network_as_it_was(trained, result, zoo):
    again = load(zoo / "digits.pt").model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in trained.model.state_dict().items())


def test_compress_gives_a_smaller_plain_network_and_says_so(result, data):
    size = result.report["size"]
    counted = sum(int(parameter.count_nonzero()) for parameter in result.model.parameters())
    assert size["after"]["nonzeros"] == counted < size["before"]["nonzeros"]
    assert size["compression_ratio"]["nonzeros"] == pytest.approx(size["before"]["nonzeros"] / counted)
    assert not any(type(module).__module__.startswith("vbdcompress.vbd") for module in result.model.modules())
    error = measure_error(result.model, loader_of(data.test, shuffle=False))
    assert result.report["error"] == pytest.approx(error)
    assert [stage["mode"] for stage in result.report["stages"]] == ["channels", "weights"]
    assert [len(stage["epochs"]) for stage in result.report["stages"]] == [6, 6]
    assert len(result.report["finetune"]) == 2
    assert result.report["warnings"] == []


def test_export_writes_files_that_a_stranger_can_use(result, data, tmp_path):
    content = result.export(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(content["files"])
    told = json.loads((tmp_path / "report.json").read_text())
    assert told == json.loads(json.dumps(content)) == json.loads(json.dumps(result.report))
    # What a stranger does: raw pixels in [0, 1], the report's mean and std, onnxruntime
    pixels = data.test.inputs.numpy() * data.input.std[0] + data.input.mean[0]
    mean, std = (np.array(told["input"][key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(None, {told["input"]["name"]: ((pixels - mean) / std).astype(np.float32)})[0]
    error = 100 * float((logits.argmax(1) != data.test.labels.numpy()).mean())
    assert error == pytest.approx(told["error"], abs=0.25)
    assert told["size"]["after"]["bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert [row["batch"] for row in told["latency"]] == [1, 64]
    assert told["export"]["max_difference"] <= told["export"]["tolerance"]


def test_load_slim_of_an_export_equals_the_result(result, trained, tmp_path):
    vbdcompress.export(result.model, tmp_path, result.files.samples, result.files.plans)
    fresh = vbdcompress.load_slim(tmp_path / "slim.safetensors", build_architecture("digits"))
    with torch.no_grad():
        assert torch.equal(fresh(result.files.samples), result.model(result.files.samples))


def test_export_of_rounded_weights_is_small_and_as_good_as_the_report_says(trained, data, tmp_path):
    rounded = compress(
        trained.model,
        loader_of(data.train),
        validation=loader_of(data.validation, shuffle=False),
        test=loader_of(data.test, shuffle=False),
        mode="weights",
        epochs=6,
        finetune_epochs=2,
        bits="auto",
    )
    content = rounded.export(tmp_path)
    assert {row["name"] for row in content["rounding"]["layers"]} == {
        f"{layer}.weight" for layer in ("conv1", "conv2", "fc1", "fc2")
    }
    assert all(row["error_over_sigma"] <= 1 or row["bits"] == 16 for row in content["rounding"]["layers"])
    assert content["export"]["packed"]
    assert content["size"]["after"]["bytes"] < 2.5 * content["size"]["after"]["nonzeros"] + 3000
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": data.test.inputs.numpy()})[0]
    assert 100 * float((logits.argmax(1) != data.test.labels.numpy()).mean()) == pytest.approx(
        content["error"]
    )
    fresh = vbdcompress.load_slim(tmp_path / "slim.safetensors", build_architecture("digits"))
    with torch.no_grad():
        assert torch.equal(fresh(rounded.files.samples), rounded.model(rounded.files.samples))


def test_a_first_round_of_weights_is_cut_before_the_last(trained, data, tmp_path):
    two = compress(
        trained.model,
        loader_of(data.train),
        validation=loader_of(data.validation, shuffle=False),
        test=loader_of(data.test, shuffle=False),
        mode="weights",
        epochs=3,
        finetune_epochs=0,
        threshold=-1.0,
        first={"mode": "weights", "epochs": 12, "beta": 3.0, "warmup_epochs": 1},
    )
    first, last = two.report["stages"]
    assert [len(stage["epochs"]) for stage in (first, last)] == [12, 3]
    assert [stage["selection"]["threshold"] for stage in (first, last)] == [3.0, -1.0]
    told = [stage["selection"]["explanation"] for stage in (first, last)]
    assert told == ["log_alpha >= 3, a first round's default", "log_alpha >= -1, asked for"]
    sizes = [sum(row["parameters"] for row in stage["table"]) for stage in (first, last)]
    assert sizes[1] < sizes[0]  # what the last round is fitted on
    two.export(tmp_path / "two")
    again = vbdcompress.load_slim(tmp_path / "two" / "slim.safetensors", build_architecture("digits"))
    with torch.no_grad():
        assert torch.equal(again(two.files.samples), two.model(two.files.samples))


@pytest.mark.parametrize(
    ("options", "costs"),
    [
        ({"mode": "both", "cost": "params"}, ["params", "none"]),
        ({"cost": "params", "first": {"mode": "channels", "cost": "macs"}}, ["macs", "params"]),
    ],
)
def test_the_report_says_of_which_rounds_cost_weighed_the_kl(trained, data, options, costs):
    found = compress(
        trained.model,
        loader_of(data.train),
        validation=loader_of(data.validation, shuffle=False),
        test=loader_of(data.test, shuffle=False),
        epochs=1,
        finetune_epochs=0,
        **options,
    )
    assert [stage["cost"] for stage in found.report["stages"]] == costs


def test_compress_with_only_a_loader_splits_it_and_warns(trained, data):
    with pytest.warns(UserWarning, match="validation") as seen:
        result = compress(trained.model, loader_of(data.train), epochs=1, finetune_epochs=0)
    text = " ".join(str(item.message) for item in seen)
    assert "may have been trained on its validation examples" in text
    assert "no test set" in text
    assert result.report["error_split"] == "validation"
    assert result.report["data"]["train"] + result.report["data"]["validation"] == len(data.train)


@pytest.mark.parametrize("apart", [True, False])
def test_compress_says_where_validation_and_test_data_are_those_that_are_trained_on(trained, data, apart):
    examples = TensorDataset(data.train.inputs, data.train.labels)
    parts = [
        Subset(examples, range(start, start + 100)) for start in ((0, 100, 200) if apart else (0, 50, 99))
    ]
    loader, held, test = (DataLoader(part, 50) for part in parts)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = compress(trained.model, loader, validation=held, test=test, epochs=1, finetune_epochs=0)
    told = " ".join(str(item.message) for item in seen)
    assert [words in told for words in ("trained on its validation", "The test data hold")] == 2 * [not apart]
    assert result.report["data"]["validation_held_out"] == (True if apart else None)


def test_compress_takes_a_loss_and_a_metric(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    inputs = data.train.inputs
    dataset = TensorDataset(inputs, inputs.mean((1, 2, 3))[:, None])
    loader = DataLoader(dataset, batch_size=64)

    def loss(output, target):
        return ((output - target) ** 2).mean()

    def metric(output, target):
        return ((output - target).abs() > 0.05).float().flatten()

    with pytest.warns(UserWarning, match="no test set"):
        result = compress(
            model,
            loader,
            validation=loader,
            loss=loss,
            metric=metric,
            mode="weights",
            epochs=20,
            warmup_epochs=2,
            finetune_epochs=0,
            lr=1e-2,
        )
    log = result.report["stages"][0]["epochs"]
    assert log[-1]["nll"] < 0.5 * log[0]["nll"]
    assert 0 <= result.report["error"] <= 100


def test_compress_says_when_no_threshold_keeps_the_budget(trained, data):
    with pytest.raises(SlimError, match=r"no cut keeps it: .*limit 3"):
        compress(
            trained.model,
            loader_of(data.train),
            validation=loader_of(data.validation),
            epochs=1,
            max_params=3,
        )


def test_compress_keeps_the_user_s_own_checkpoints(trained, data, tmp_path):
    (tmp_path / "best.ckpt").write_text("mine")
    loaders = {"validation": loader_of(data.validation), "test": loader_of(data.test)}
    options = {"epochs": 1, "finetune_epochs": 0, "checkpoints": tmp_path}
    compress(trained.model, loader_of(data.train), **loaders, **options)
    kept = ["1-channels.choice.json", "1-channels.ckpt", "best.ckpt", "run.json"]
    assert sorted(item.name for item in tmp_path.iterdir()) == kept
    assert (tmp_path / "best.ckpt").read_text() == "mine"


def test_compress_refuses_unknown_options_and_bad_loaders(trained, data):
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        compress(trained.model, loader_of(data.train), epoch=3)
    validation = loader_of(data.validation)
    with pytest.raises(DataError, match="yields no batch"):
        compress(trained.model, [], validation=validation)
    with pytest.raises(DataError, match="yields Tensors"):
        compress(trained.model, [torch.zeros(3, 1, 8, 8)], validation=validation)
    with pytest.raises(DataError, match="no validation data can be split off"):
        compress(trained.model, iter([(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))]))
    nan = TensorDataset(torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="NaN"):
        compress(trained.model, DataLoader(nan), validation=validation)


def test_an_input_that_is_not_the_loader_s_is_refused(trained, data):
    said = vbdcompress.InputSpec([3, 8, 8], (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(
        ConfigError, match=r"says examples of shape \[3, 8, 8\], the loader's are \[1, 8, 8\]"
    ):
        compress(trained.model, loader_of(data.train), validation=loader_of(data.validation), input=said)


def test_a_network_that_names_one_class_for_all_is_warned_of(trained, data):
    with pytest.warns(UserWarning, match="one class for all of 64 training examples"):
        compress(
            trained.model,
            loader_of(data.train, batch_size=128),
            validation=loader_of(data.validation, shuffle=False),
            test=loader_of(data.test, shuffle=False),
            epochs=2,
            finetune_epochs=0,
            beta=500.0,
            warmup_epochs=0,
            threshold=-8.0,
        )


def test_public_names_are_what_they_say():
    assert set(vbdcompress.__all__) <= set(vbdcompress._HOME)
    for name in vbdcompress.__all__:
        value = getattr(vbdcompress, name)
        assert callable(value)
        assert value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        _ = vbdcompress.shrink
