"""What is read off a batch's shape: which dimension is the batch, and whether batches are alike."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from vbdcompress.data import TensorBatches
from vbdcompress.errors import ConfigError, ConvertError
from vbdcompress.pipeline import compress
from vbdcompress.records import InputSpec

DIFFER = r"Batches differ in shape: examples of \[\d+\] and of \[\d+\], say. MACs and latency"


class Tokens(nn.Module):
    """Two classes from the mean over a sentence's tokens; 0 pads."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.time = 1 if batch_first else 0
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, ids: Tensor) -> Tensor:
        kept = (ids != 0).unsqueeze(-1)
        return self.body((self.table(ids) * kept).sum(self.time) / kept.sum(self.time).clamp_min(1))


def padded(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*examples, strict=True)
    return pad_sequence(list(ids), batch_first=True), torch.tensor(labels)


def sentences(lengths: Callable[[int], int]) -> list[tuple[Tensor, int]]:
    drawn = torch.Generator().manual_seed(0)
    return [(torch.randint(1, 20, (lengths(n),), generator=drawn), n % 2) for n in range(48)]


def serve(folder: Path, ids: Tensor) -> Tensor:
    """What onnxruntime makes of a batch."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    given = {item.name: ids.numpy() for item in session.get_inputs()}
    return torch.from_numpy(session.run(None, given)[0])


@pytest.mark.parametrize(
    ("options", "shuffle"),
    [
        ({"mode": "weights", "int8": True}, False),
        ({"mode": "channels"}, True),
        pytest.param({"mode": "weights", "int8": True}, True, marks=pytest.mark.slow),
        pytest.param({"mode": "channels"}, False, marks=pytest.mark.slow),
    ],
)
def test_batches_of_several_lengths_give_a_file_for_any(
    shuffle: bool, options: dict[str, Any], tmp_path: Path
):
    examples = sentences(lambda n: 3 + n % 17)
    loader = DataLoader(examples, 4, shuffle=shuffle, collate_fn=padded)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=f"{DIFFER}.* takes them all") as caught:
        result = compress(
            Tokens(), loader, validation=loader, test=loader, epochs=1, finetune_epochs=0, **options
        )
    told = next(str(each.message) for each in caught if "differ in shape" in str(each.message))
    content = result.export(tmp_path)
    assert told in content["warnings"]
    assert f"are for {list(content['input']['shape'])}; the ONNX" in told
    assert content["inputs"][0]["any_size"] == [1]
    assert "batch\N{MULTIPLICATION SIGN}any" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for length in (1, 2, 19, 40):  # the longest sentence has 19
        ids = torch.randint(1, 20, (3, length))
        torch.testing.assert_close(serve(tmp_path, ids), result.model(ids).detach(), rtol=1e-4, atol=1e-5)


def test_a_network_that_is_exported_for_one_length_alone_says_so(tmp_path: Path):
    class Branching(Tokens):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (2 if ids.shape[1] > 8 else 1)

    batches = [(torch.randint(1, 20, (6, length)), torch.arange(6) % 2) for length in (5, 12, 7)]
    with pytest.warns(UserWarning, match=f"{DIFFER}.* takes no others"):
        result = compress(Branching(), batches, validation=batches, test=batches, epochs=1)
    content = result.export(tmp_path)
    assert "any_size" not in content["inputs"][0]
    torch.testing.assert_close(
        serve(tmp_path, batches[0][0]), result.model(batches[0][0]).detach(), rtol=1e-4, atol=1e-5
    )


def test_batches_of_more_dimensions_are_told_of(tmp_path: Path):
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.flatten(1, -2).sum(1) if x.dim() > 2 else x)

    batches = [(torch.rand(6, 4), torch.arange(6) % 2), (torch.rand(6, 3, 4), torch.arange(6) % 2)]
    with pytest.warns(UserWarning, match=r"examples of \[4\] and of \[3, 4\], say.* takes no others"):
        compress(Sums(), batches, validation=batches, test=batches, epochs=1).export(tmp_path)


def test_batches_of_one_length_are_not_warned_of():
    loader = DataLoader(sentences(lambda _: 9), 5, collate_fn=padded)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*differ in shape")
        result = compress(Tokens(), loader, validation=loader, test=loader, epochs=1, finetune_epochs=0)
    assert list(result.report["input"]["shape"]) == [9]


def test_an_input_spec_may_name_any_shape_that_was_seen():
    batches = [(torch.randint(1, 20, (6, length)), torch.arange(6) % 2) for length in (5, 12)]
    spec = InputSpec((12,))
    with pytest.warns(UserWarning, match=DIFFER):
        result = compress(Tokens(), batches, validation=batches, test=batches, input=spec, epochs=1)
    assert tuple(result.report["input"]["shape"]) == (12,)


def test_another_length_of_the_test_data_is_seen(tmp_path: Path):
    batches, test = ([(torch.randint(1, 20, (6, length)), torch.arange(6) % 2)] for length in (5, 12))
    with pytest.warns(UserWarning, match=f"{DIFFER}.* takes them all"):
        compress(Tokens(), batches, validation=batches, test=test, epochs=1).export(tmp_path)
    assert len(serve(tmp_path, test[0][0])) == 6


def test_one_output_for_all_inputs_is_no_matter_of_the_batch(tmp_path: Path):
    """A bag of instances: the outputs' only size is one that no dimension of the inputs has."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(6, 12), nn.ReLU()), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean(0, keepdim=True))

    bags = [(torch.rand(9, 6), torch.tensor([n % 2])) for n in range(4)]
    result = compress(Bag(), bags, validation=bags, test=bags, epochs=1)
    result.export(tmp_path)
    bag = torch.rand(20, 6)  # the file takes a bag of any size
    torch.testing.assert_close(serve(tmp_path, bag), result.model(bag).detach(), rtol=1e-4, atol=1e-5)


def test_an_input_spec_of_another_shape_is_refused():
    loader = DataLoader(sentences(lambda _: 9), 5, collate_fn=padded)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"InputSpec says examples of shape \[8\], the loader's are \[9\]"):
        compress(Tokens(), loader, validation=loader, input=InputSpec((8,)))


def test_a_normalisation_of_other_channels_is_refused():
    images = [(torch.rand(6, 3, 4, 4), torch.arange(6) % 2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(ConfigError, match="InputSpec has 2 numbers in mean, the examples have 3 channels"):
        compress(model, images, validation=images, input=InputSpec((3, 4, 4), (0.5, 0.5), (0.2, 0.2)))


def test_a_network_that_takes_time_first_is_refused():
    batches = [(torch.randint(1, 20, (9, 6)), torch.arange(6) % 2) for _ in range(3)]
    with pytest.raises(ConvertError, match=r"(?s)outputs have 6 .* have 9 or 2 .*batch_first=True"):
        compress(Tokens(batch_first=False), batches, validation=batches)


@pytest.mark.parametrize(
    ("mode", "without"),
    [
        ("channels", torch.no_grad),
        ("weights", torch.inference_mode),
        pytest.param("weights", torch.no_grad, marks=pytest.mark.slow),
        pytest.param("channels", torch.inference_mode, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The network may have been trained")
def test_compress_keeps_gradients_where_the_caller_has_none(
    mode: str, without: Callable[[], AbstractContextManager[None]]
) -> None:
    loader = TensorBatches(torch.randint(1, 20, (24, 9)), torch.arange(24) % 2, 6)
    with without():
        model = Tokens()
        batches = [(torch.randint(1, 20, (6, 9)), torch.arange(6) % 2) for _ in range(3)]
        split = compress(model, loader, test=batches, mode=mode, epochs=1)  # by indexing, which makes tensors
        result = compress(model, batches, validation=batches, test=batches, mode=mode, epochs=2)
        assert torch.is_grad_enabled() is False
    assert len(split.report["stages"][0]["epochs"]) == 1
    assert result.model(batches[0][0].clone()).requires_grad
    first, last = (result.report["stages"][0]["epochs"][place]["nll"] for place in (0, -1))
    assert last != first


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        output: Tensor = self.b(self.a(x).relu() * scale)
        return output


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 2.5)])
def test_numbers_that_differ_from_batch_to_batch_are_told_of(scales: tuple[float, float]) -> None:
    torch.manual_seed(0)
    batches = [({"x": torch.randn(16, 5), "scale": scale}, torch.arange(16) % 2) for scale in scales]
    options = {"epochs": 1, "finetune_epochs": 0, "threshold": 1e9, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = compress(Scaled(), batches, validation=batches, test=batches, **options).report
    told = [warning for warning in report["warnings"] if "differ from batch to batch: 1.0 and 2.5" in warning]
    assert len(told) == (scales[0] != scales[1])


def test_an_autocast_of_the_caller_changes_nothing(tmp_path: Path):
    x = torch.randn(64, 6)
    batches = [(x, x[:, :3].argmax(1))]
    seen = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = compress(model, batches, validation=batches, test=batches, epochs=2)
            content = result.export(tmp_path)
        assert content["export"]["max_difference"] < 1e-5
        seen.append([row["nll"] for row in content["stages"][0]["epochs"]])
    assert seen[0] == seen[1]
