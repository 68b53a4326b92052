"""What users mistake for a loader, a network or a folder is named before it costs them a fit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from vbdcompress.errors import ConfigError, ConvertError, DataError, ExportError
from vbdcompress.pipeline import compress
from vbdcompress.records import EpochRow

Batches = list[tuple[Tensor, Tensor]]


def digits() -> tuple[nn.Module, Batches]:
    """A network and batches of random images for it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return model, [(torch.rand(8, 1, 8, 8), torch.arange(8)) for _ in range(4)]


def test_inputs_of_another_size_are_named_by_their_part():
    model, batches = digits()
    other = [(torch.rand(8, 1, 9, 9), targets) for _, targets in batches]
    for part in ("validation", "test"):
        given = {"validation": batches, "test": batches} | {part: other}
        with pytest.raises(DataError, match=rf"{part} loader: yields inputs of \(8, 1, 9, 9\), on which"):
            compress(model, batches, **given, epochs=1)


def test_a_data_set_is_no_loader():
    model, batches = digits()
    examples = torch.utils.data.TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
    with pytest.raises(DataError, match=r"(?s)yields single examples.*DataLoader\(dataset"):
        compress(model, examples, validation=batches)


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"x": torch.rand(8, 1, 8, 8), "y": torch.arange(8)}], r"(?s)loader: yields dicts of 2.*unpack="),
        ((torch.rand(8, 1, 8, 8), torch.arange(8)), r"loader: yields .*allowed are pairs"),
        (torch.utils.data.TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9)), "yields single examples"),
        ([], "loader: is empty"),
        (iter([]), "gives its batches only once"),
    ],
)
def test_a_part_that_yields_no_pairs_is_named(part: str, given: object, message: str) -> None:
    model, batches = digits()
    with pytest.raises(DataError, match=message) as caught:
        compress(model, batches, **({"validation": batches} | {part: given}), epochs=1, listener=Untold())
    assert isinstance(given, Iterator) or caught.value.where == f"{part} loader"


@pytest.mark.parametrize("options", [{"bits": "8"}, {"pack": True}])
def test_double_precision_is_not_packed(options: dict[str, object]) -> None:
    model, batches = digits()
    double = [(inputs.double(), targets) for inputs, targets in batches]
    with pytest.raises(ConfigError, match=r"(?s)torch.float64.*model.float\(\)"):
        compress(model.double(), double, validation=double, listener=Untold(), **options)


def test_int8_is_for_a_bare_tensor():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, _ = digits()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.body(x)}

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output["out"], target)

    def metric(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return (output["out"].argmax(1) != target).float()

    _, batches = digits()
    with pytest.raises(ConfigError, match="int8: is for networks with one output, a bare tensor"):
        compress(Named(), batches, validation=batches, loss=loss, metric=metric, int8=True, listener=Untold())


def test_sparse_state_is_named():
    model, batches = digits()
    model.register_buffer("near", torch.eye(4).to_sparse())
    with pytest.raises(ConvertError, match=r"(?s)'near' is torch\.sparse_coo.*persistent=False"):
        compress(model, batches, validation=batches, listener=Untold())


def test_a_metric_that_is_no_number_in_a_later_batch_is_named_before_the_fit():
    model, batches = digits()

    def metric(output: Tensor, target: Tensor) -> Tensor:
        wrong = (output.argmax(1) != target).float()
        return wrong * torch.nan if len(target) == 7 else wrong

    parts = [*batches, (batches[0][0][:7], batches[0][1][:7])]
    with pytest.raises(DataError, match=r"metric's mean over 39 values is nan"):
        compress(model, batches, validation=parts, metric=metric, listener=Untold())


def test_a_network_without_parameters_is_refused():
    _, batches = digits()
    with pytest.raises(ConvertError, match="it has no parameters"):
        compress(nn.Flatten(), batches, validation=batches)


def test_a_file_is_no_folder_to_export_to(tmp_path):
    model, batches = digits()
    (tmp_path / "mine").write_text("mine")
    with pytest.warns(UserWarning, match="no test set"):
        found = compress(model, batches, validation=batches, epochs=0, finetune_epochs=0)
    with pytest.raises(ExportError, match="is a file; allowed is a folder"):
        found.export(tmp_path / "mine")


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_label_of_no_class_is_found_in_any_batch_before_the_fit(part: str, label: int) -> None:
    model, batches = digits()
    wrong = [*batches[:3], (batches[3][0], torch.tensor([0, 1, label, 3, 4, 5, 6, 7]))]
    given = {"validation": batches, "test": batches} | {part: wrong}
    with pytest.raises(DataError, match=rf"{part} loader: 1 of 32 labels are of no class.*0 to 9"):
        compress(model, batches, **given, epochs=1, listener=Untold())


class Untold:
    """A listener that nothing may be told."""

    def on_start(self, title: str, epochs: int) -> None:
        pytest.fail("the fit began")

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """Not reached."""

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        """Not reached."""
