"""Which checkpoints a resumed run keeps: those of the steps that its changed options do not act on."""

import pytest
import torch
from torch import nn

from vbdcompress.config import make_config
from vbdcompress.data import TensorBatches
from vbdcompress.errors import FitError
from vbdcompress.workplace import OUTPUTS, Workplace, identify_run

ALL = ["1-channels", "2-weights", "finetune"]
FIRST = {"mode": "channels", "epochs": 3}


def resume(folder, before, after):
    """Names of the checkpoints that are left of `ALL`."""
    model = nn.Linear(3, 2)

    def identity(options):
        config = make_config({"mode": "weights", **options})
        return identify_run(model, ("digits", 10, 2), config, torch.zeros(1, 3))

    Workplace(folder).claim(identity(before))
    for step in ALL:
        (folder / f"{step}.ckpt").touch()
    Workplace(folder, resume=True).claim(identity(after))
    return sorted(path.stem for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("first", "changed", "kept"),
    [
        (FIRST, {}, ALL),
        (FIRST, {"device": "cpu", "precision": "bf16-mixed", "compile": True}, ALL),
        (FIRST, {"bits": "8", "pack": False, "int8": True}, ALL),
        (FIRST, {"finetune_epochs": 3}, ALL[:2]),
        (FIRST | {"max_bytes": 900}, {"bits": "8"}, ALL[:2]),  # another point may be chosen
        (FIRST, {"lr_finetune": 1e-4, "bits": "4"}, ALL[:2]),
        (FIRST, {"threshold": 2.0}, ALL[:1]),  # of the first round, too
        (FIRST, {"round_to": 8}, ALL[:1]),
        (FIRST | {"threshold": 1.0}, {"threshold": 2.0}, ALL[:2]),
        (FIRST | {"threshold": 1.0}, {"max_params": "10%"}, ALL[:1]),
        ({"mode": "weights"}, {"threshold": 2.0}, ALL[:2]),
    ],
)
def test_claim_keeps_the_steps_before_the_change(tmp_path, first, changed, kept):
    before = {"first": {key: value for key, value in first.items() if key != "max_bytes"}}
    before |= {key: value for key, value in first.items() if key == "max_bytes"}
    assert resume(tmp_path, before, before | changed) == kept


@pytest.mark.parametrize("changed", [{"lr": 0.5}, {"mode": "channels"}, {"first": FIRST | {"beta": 2.0}}])
def test_claim_refuses_another_fit(tmp_path, changed):
    with pytest.raises(FitError, match="is another"):
        resume(tmp_path, {"first": FIRST}, {"first": FIRST} | changed)


def test_claim_of_a_new_run_keeps_nothing_of_the_last(tmp_path):
    Workplace(tmp_path).claim(identity_of())
    for step in (*ALL, "mine"):
        (tmp_path / f"{step}.ckpt").touch()
    Workplace(tmp_path).claim(identity_of())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["mine.ckpt"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("finetune.ckpt", "mine"), ("run.json", '{"mine": 1}'), ("run.json", "[1]"), ("run.json", "mine")],
)
@pytest.mark.parametrize("resume", [False, True])
def test_claim_leaves_the_user_s_own_files(tmp_path, name, content, resume):
    (tmp_path / name).write_text(content)
    with pytest.raises(FitError, match=f"(?s)holds {name}, which no run .*folder of its own"):
        Workplace(tmp_path, resume=resume).claim(identity_of())
    assert (tmp_path / name).read_text() == content


def test_claim_refuses_inputs_that_were_normalised_otherwise(tmp_path):
    config, model = make_config({"mode": "weights"}), nn.Linear(3, 2)
    before, after = (
        identify_run(model, ("digits", 10, 2, [mean], [1.0]), config, torch.zeros(1, 3))
        for mean in (0.0, 0.5)
    )
    Workplace(tmp_path).claim(before)
    with pytest.raises(FitError, match="is another"):
        Workplace(tmp_path, resume=True).claim(after)


class Activated(nn.Module):
    """The same weights, whatever the function behind them."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(3, 2), function

    def forward(self, x):
        return self.function(self.layer(x))


def identity_of(function=torch.relu, **judge):
    config = make_config({"mode": "weights"})
    return identify_run(Activated(function), ("digits", 10, 2), config, torch.zeros(4, 3), **judge)


def test_claim_refuses_the_weights_in_another_network(tmp_path):
    Workplace(tmp_path).claim(identity_of())
    Workplace(tmp_path, resume=True).claim(identity_of(lambda x: torch.relu(x) + 1e-6 * x))  # rounding
    with pytest.raises(FitError, match="of the same weights, gives other outputs"):
        Workplace(tmp_path, resume=True).claim(identity_of(torch.tanh))


@pytest.mark.parametrize("judge", ["loss", "metric"])
def test_claim_refuses_another_judge(tmp_path, judge):
    Workplace(tmp_path).claim(identity_of())
    with pytest.raises(FitError, match=f"{judge} was None, is mse_loss"):
        Workplace(tmp_path, resume=True).claim(identity_of(**{judge: nn.functional.mse_loss}))


def test_a_network_that_takes_no_made_up_inputs_is_known_by_its_weights():
    def refuses(x):
        raise ValueError("made up")

    assert identity_of(refuses)[OUTPUTS] is None
    numbers = identity_of(lambda x: x / 0)[OUTPUTS]
    assert numbers == [None] * 4


def test_a_set_is_told_from_another_of_its_size():
    inputs, labels = torch.rand(600, 3), torch.arange(600) % 7
    digest = TensorBatches(inputs, labels, 10).digest()
    assert TensorBatches(inputs.clone(), labels.clone(), 20, shuffle=True, seed=3).digest() == digest
    assert TensorBatches(inputs, labels.roll(1), 10).digest() != digest
    assert TensorBatches(inputs + 1, labels, 10).digest() != digest


def test_complex_outputs_are_told_apart_by_both_parts():
    numbers = identity_of(lambda x: torch.complex(x, x))[OUTPUTS]
    assert len(numbers) == 8


def test_low_precision_data_are_told_apart_too():
    low = torch.rand(20, 3, dtype=torch.bfloat16)
    digests = {TensorBatches(inputs, torch.arange(20), 5).digest() for inputs in (low, low + 1)}
    assert len(digests) == 2


def test_what_a_killed_run_had_half_written_goes_and_other_files_stay(tmp_path):
    names = ["1-channels.ckpt.77.part", "finetune.ckpt.78.part", "notes.part", "mine.ckpt.1.part"]
    for name in names:
        (tmp_path / name).touch()
    Workplace(tmp_path).claim(identity_of())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.ckpt.1.part", "notes.part", "run.json"]
