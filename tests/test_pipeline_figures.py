"""What a report says is what anybody finds who counts again, whatever loaders and mishaps there were."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vbdcompress.data import Unpacked, count_examples
from vbdcompress.data.loaders import whole
from vbdcompress.errors import DataError
from vbdcompress.pipeline import compress
from vbdcompress.records import EpochRow, InputSpec
from vbdcompress.surgery.sizes import other_sizes

pytestmark = pytest.mark.filterwarnings("ignore:The slim network names one class")


def images(count: int, seed: int) -> TensorDataset:
    """Noise of 8 x 8 pixels in which one of two halves is brighter; no bytes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    inputs = 0.8 * torch.rand(count, 1, 8, 8, generator=generator)
    inputs[labels == 0, :, :4] += 0.2
    inputs[labels == 1, :, 4:] += 0.2
    return TensorDataset(inputs, labels)


def parts(**options: Any) -> dict[str, Any]:
    """Loader, validation and test of `images`."""
    train = DataLoader(images(64, 0), 16)
    return {
        "loader": train,
        "validation": DataLoader(images(50, 1), 32, **options),
        "test": DataLoader(images(50, 2), 32, **options),
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


QUICK = {"epochs": 2, "finetune_epochs": 1, "device": "cpu"}


def test_both_networks_are_measured_on_all_examples_though_the_loaders_drop_some() -> None:
    given = parts(shuffle=True, drop_last=True)
    result = compress(network(), **given, epochs=0, finetune_epochs=0, threshold=1e9, device="cpu")
    for name, error in result.report["errors"].items():
        assert error["before"] == error["after"]  # nothing went, and nothing was trained
        assert result.report["data"][name] == 50
        inputs, labels = given[name].dataset.tensors
        with torch.no_grad():
            wrong = (result.original(inputs).argmax(1) != labels).float().mean()
        assert error["before"] == pytest.approx(100 * float(wrong))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(7.0)[:, None])


def first_of(batch: Any) -> tuple[Any, Tensor]:
    return batch, batch[0] if isinstance(batch, list) else batch


@pytest.mark.parametrize("dataset", [TensorDataset(torch.arange(7.0)), Stream()])
def test_whole_takes_the_last_batch_and_keeps_what_drops_none(dataset: Any) -> None:
    dropping = DataLoader(dataset, 3, drop_last=True)
    assert count_examples(Unpacked(whole(dropping), first_of)) == 7
    loader = DataLoader(dataset, 3)
    assert whole(loader) is loader


def digits_of(output: Tensor, target: Tensor) -> Tensor:
    """[batch]: of a logit what stands behind the second digit, which any change of the inputs moves."""
    return (100 * output[torch.arange(len(target)), target]) % 1.0


def test_a_file_of_pixels_has_the_reported_error_where_images_were_no_bytes(
    tmp_path: Path,
) -> None:
    given = parts()
    spec = InputSpec((1, 8, 8), (0.5,), (0.01,))  # so that rounding to bytes shows
    for name in given:
        given[name] = [((x - 0.5) / 0.01, y) for x, y in given[name]]
    result = compress(
        network(), **given, input=spec, metric=digits_of, embed_preprocessing=True, threshold=0.0, **QUICK
    )
    result.export(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs, labels = images(50, 2).tensors
    pixels = (inputs * 255).round().to(torch.uint8).numpy()
    output = torch.from_numpy(np.asarray(session.run(None, {"input": pixels})[0]))
    found = 100 * float(digits_of(output, labels).mean())
    assert result.report["errors"]["test"]["after"] == pytest.approx(found, abs=0.1)
    with torch.no_grad():
        exact = 100 * float(digits_of(result.model((inputs - 0.5) / 0.01), labels).mean())
    assert abs(exact - found) > 1


@pytest.mark.parametrize("part", ["validation", "test"])
def test_examples_that_are_no_numbers_are_told_of_in_any_batch(part: str) -> None:
    given = parts()
    given[part].dataset.tensors[0][40:43, :, 2] = torch.inf
    found = "evaluation: 3 of 50 examples hold NaN or infinite values."
    if part == "validation":
        with pytest.raises(DataError, match=found):
            compress(network(), **given, threshold=0.0, **QUICK)
        return
    with pytest.warns(UserWarning, match="The test set, " + found):
        report = compress(network(), **given, threshold=0.0, **QUICK).report
    assert len(report["warnings"]) == 1


class Grouped(nn.Module):
    """onnxruntime can't quantise a transposed convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(1, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.up(self.a(x).relu()).relu().amax((2, 3)))
        return output


def test_a_refused_int8_file_leaves_network_and_report_of_one_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Grouped()
    (tmp_path / ".4.part").mkdir()  # of an export that was killed
    compress(model, **parts(), threshold=0.0, **QUICK).export(tmp_path)
    (tmp_path / "model_int8.onnx").write_bytes(b"of another run")
    result = compress(model, **parts(), mode="weights", int8=True, **QUICK)
    result.export(tmp_path)
    content = result.export(tmp_path)
    assert sum("There is no model_int8.onnx" in told for told in content["warnings"]) == 1
    files = ["model.onnx", "report.html", "report.json", "slim.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files == sorted(content["files"])
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["export"]["bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert told["stages"][0]["mode"] == "weights"


def test_an_int8_file_that_the_metric_fails_on_is_not_kept(tmp_path: Path) -> None:
    error = [0.5]
    metric = lambda output, target: torch.full((len(target),), error[0])  # noqa: E731
    result = compress(network(), **parts(), metric=metric, threshold=0.0, int8=True, **QUICK)
    error[0] = math.nan
    content = result.export(tmp_path)
    assert any("There is no model_int8.onnx: evaluation: the metric" in told for told in content["warnings"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(content["files"])


def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compress(network(), **parts(), threshold=0.0, **QUICK)
    result.export(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = compress(network(), **parts(), mode="weights", threshold=-9.0, **QUICK)

    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("vbdcompress.result.write_report", fails)
    with pytest.raises(OSError, match="full"):
        other.export(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_skipped_layer_with_a_computed_weight_counts_alike_before_and_after() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 6)), nn.ReLU(), nn.Linear(6, 2))
    result = compress(model, **parts(), skip=["1"], mode="weights", threshold=1e9, **QUICK)
    size, rows = result.report["size"], result.report["layers"]
    assert size["before"]["parameters"] == size["after"]["parameters"]
    assert sum(row["before"]["parameters"] for row in rows) == size["before"]["parameters"]


class StopError(Exception):
    """Raised in the midst of a run."""


class Stops:
    """Ends a run after its first epoch of fine-tuning."""

    title = ""

    def on_start(self, title: str, epochs: int) -> None:
        self.title = title

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None: ...

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        if self.title == "Fine-tuning":
            raise StopError


def test_a_resumed_run_took_as_long_as_its_epochs(tmp_path: Path) -> None:
    options = {"checkpoints": tmp_path, "epochs": 60, "finetune_epochs": 2, "device": "cpu"}
    with pytest.raises(StopError):
        compress(network(), **parts(), **options, threshold=0.0, listener=Stops())
    report = compress(network(), **parts(), **options, threshold=0.0, resume=True).report
    rows = [*report["stages"][0]["epochs"], *report["finetune"]]
    assert len(rows) == 62
    assert report["seconds"] > sum(row["seconds"] for row in rows)


def test_examples_a_second_are_those_that_were_shown() -> None:
    given = parts() | {"loader": DataLoader(images(64, 0), 40, drop_last=True)}
    rows = compress(network(), **given, threshold=0.0, **QUICK).report["stages"][0]["epochs"]
    for row in rows:
        assert row["examples_per_second"] * row["seconds"] == pytest.approx(40)


class Words(nn.Module):
    """No Linear layer and no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.matrix = nn.Embedding(20, 20), nn.Parameter(torch.randn(20, 2))

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.table(ids).mean(1) @ self.matrix
        return output


def test_bits_round_what_is_neither_linear_nor_a_convolution() -> None:
    ids = torch.randint(0, 20, (40, 3), generator=torch.Generator().manual_seed(0))
    batches = [(ids, ids[:, 0] % 2)]
    options = {"mode": "weights", "bits": "auto", "threshold": 1e9}
    report = compress(Words(), batches, validation=batches, test=batches, **options, **QUICK).report
    rows = {row["name"]: row for row in report["rounding"]["layers"]}
    assert sorted(rows) == ["matrix", "table.weight"]
    assert all(0 < row["error_over_sigma"] < 1 and row["bits"] < 16 for row in rows.values())


def test_rounded_weights_that_are_not_packed_are_said_to_take_32_bits(tmp_path: Path) -> None:
    options = {"mode": "weights", "bits": "8", "pack": False, "max_params": "50%"}
    compress(network(), **parts(), **options, **QUICK).export(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "stored in 32-bit floats all the same" in page
    assert "After each epoch of a posterior, masked at a log alpha of 0 (it was cut at" in page


def test_a_second_round_folds_behind_layers_that_pick_features() -> None:
    model = network()
    options = {"mode": "both", "prune_inputs": True, "threshold": -1.5, "beta": 8.0, "epochs": 8}
    result = compress(model, **parts(), **options, finetune_epochs=1, device="cpu")
    inputs = images(4, 3).tensors[0]
    assert result.model(inputs).shape == (4, 2)
    # a gather takes a wider input, the network does not
    assert [tuple(each.shape) for each in other_sizes(result.model, inputs)] == []


def test_a_run_and_its_export_leave_all_generators_as_they_were(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(9)
    data, test = images(600, 0), DataLoader(images(50, 2), 32)
    loader = DataLoader(data, 50, shuffle=True)
    validation = DataLoader(images(50, 1), 32, shuffle=True, generator=own)
    model = network()
    before = torch.get_rng_state(), own.get_state()
    options = {"epochs": 1, "finetune_epochs": 1, "threshold": 0.0, "int8": True, "device": "cpu"}
    result = compress(model, loader, validation=validation, test=test, **options)
    for name in "ab":
        result.export(tmp_path / name)
    files = [(tmp_path / name / "model_int8.onnx").read_bytes() for name in "ab"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(own.get_state(), before[1])
    assert files[0] == files[1]  # calibrated on the same examples
