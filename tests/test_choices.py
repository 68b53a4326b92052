"""A run that goes on is cut where it was cut before, though another machine measures other errors."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vbdcompress.choices import Choice, ChoiceFile, describe_judgement
from vbdcompress.data import TensorBatches
from vbdcompress.errors import FitError
from vbdcompress.evaluation import top1_error
from vbdcompress.pipeline import compress
from vbdcompress.records import CurvePoint, Selection, Size

CURVE = (CurvePoint(float("inf"), 1.0, Size(9, 9, 9, 9)), CurvePoint(0.5, 2.0, Size(4, 4, 4, 4)))
CHOICE = Choice(CURVE, Selection("budget", 0.5, 1.0, {"macs": 5}, "told"), {"bits": "32"})


class Interrupting:
    """Stops a run in an epoch of its fine-tuning; keeps what it is told."""

    def __init__(self, epoch=None):
        self.epoch, self.titles, self.rows = epoch, [], []

    def on_start(self, title, epochs):
        self.titles.append(title)

    def on_step(self, *_):
        pass

    def on_epoch(self, row, epochs):
        self.rows.append(row)
        if row.sparsity is None and row.epoch == self.epoch:
            raise KeyboardInterrupt


class Machine:
    """A metric that errs in its own way on each machine."""

    def __init__(self):
        self.noise = 0.0

    def __call__(self, output, target):
        errors = top1_error(output, target).float()
        return (1 - self.noise) * errors + self.noise * torch.rand_like(errors)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    inputs = torch.randn(160, 1, 8, 8)
    labels = inputs[:, 0, :2, :2].flatten(1).argmax(1)
    batches = [TensorBatches(inputs, labels, 32, shuffle=shuffle) for shuffle in (True, False)]
    machine = Machine()

    def start(listener, shuffled=False, **changed):
        options = {
            "mode": "channels",
            "epochs": 4,
            "finetune_epochs": 4,
            "max_macs": "70%",
            "max_error_increase": None,
            "checkpoints": tmp_path,
            "metric": machine,
        } | changed
        validation = DataLoader(TensorDataset(inputs, labels), 32, shuffle=shuffled)
        return compress(
            model, batches[0], validation=validation, test=batches[1], listener=listener, **options
        )

    start.machine, start.folder = machine, tmp_path
    return start


def test_a_run_that_goes_on_is_cut_where_it_was(run):
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(3))
    kept = json.loads((run.folder / "1-channels.choice.json").read_text())
    run.machine.noise, told = 1.0, Interrupting()
    result = run(told, resume=True)
    assert told.titles[1].startswith("Fine-tuning, going on after epoch")
    (stage,) = result.report["stages"]
    assert stage["selection"]["threshold"] == kept["selection"]["threshold"]
    assert [point["error"] for point in stage["curve"]] == [point["error"] for point in kept["curve"]]


def test_a_run_that_goes_on_with_another_budget_chooses_anew(run):
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(3))
    told = Interrupting()
    report = run(told, resume=True, max_macs="50%").report
    assert told.titles[1] == "Fine-tuning"
    (stage,) = report["stages"]
    assert stage["selection"]["limits"] == {"macs": report["size"]["before"]["macs"] // 2}


@pytest.mark.parametrize("option", [{"bits": "8"}, {"bits": "16", "pack": True}])
def test_a_run_that_goes_on_may_store_its_weights_otherwise(run, option):
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(3))
    kept = json.loads((run.folder / "1-channels.choice.json").read_text())
    run.machine.noise, told = 1.0, Interrupting()
    (stage,) = run(told, resume=True, **option).report["stages"]
    assert told.titles[1].startswith("Fine-tuning, going on after epoch")
    for point, before in zip(stage["curve"], kept["curve"], strict=True):
        assert point["error"] == before["error"]
        assert point["size"]["macs"] == before["size"]["macs"]
        assert point["size"]["bytes"] != before["size"]["bytes"]


def test_a_choice_of_another_fit_is_not_taken(run):
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(3))
    path = run.folder / "1-channels.choice.json"
    kept = json.loads(path.read_text())
    kept["of"]["fit"]["nll"] += 0.1
    path.write_text(json.dumps(kept))
    (run.folder / "finetune.ckpt").unlink()
    run.machine.noise = 1.0
    (stage,) = run(Interrupting(), resume=True).report["stages"]
    assert [point["error"] for point in stage["curve"]] != [point["error"] for point in kept["curve"]]


def test_both_rounds_are_cut_where_they_were_though_validation_is_shuffled(run):
    options = {"mode": "both", "max_macs": None, "max_params": "70%"}
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(3), shuffled=True, **options)
    names = ["1-channels.choice.json", "2-weights.choice.json"]
    kept = [json.loads((run.folder / name).read_text()) for name in names]
    run.machine.noise = 1.0
    stages = run(Interrupting(), shuffled=True, resume=True, **options).report["stages"]
    for stage, before in zip(stages, kept, strict=True):
        assert [point["error"] for point in stage["curve"]] == [point["error"] for point in before["curve"]]


def test_a_run_that_starts_anew_leaves_no_choice_of_the_last_one(run):
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(3))
    with pytest.raises(SystemExit):
        run(Leaving())
    assert not (run.folder / "1-channels.choice.json").exists()


class Leaving(Interrupting):
    def on_start(self, title, epochs):
        raise SystemExit


def test_choice_comes_back_as_it_was(tmp_path):
    file = ChoiceFile(tmp_path / "1.choice.json", resume=True)
    assert file.restore({"fit": 1}) is None
    file.keep({"fit": 1}, CHOICE)
    assert file.restore({"fit": 1}) == CHOICE
    assert file.restore({"fit": 2}) is None
    assert replace(file, resume=False).restore({"fit": 1}) is None


@pytest.mark.parametrize("text", ["", "[]", '{"of": {}, "curve": [], "selection": {"rule": "x"}}'])
def test_a_file_that_holds_no_choice_is_refused(tmp_path, text):
    (tmp_path / "1.choice.json").write_text(text)
    with pytest.raises(FitError, match=r"1\.choice\.json.*holds no choice"):
        ChoiceFile(tmp_path / "1.choice.json", resume=True).restore({})


def test_judgements_are_told_apart_by_metric_and_targets():
    labels = torch.tensor([1, 2])
    same = describe_judgement(top1_error, labels)
    assert same == describe_judgement(top1_error, {"labels": labels.clone()})
    assert same != describe_judgement(top1_error, labels + 1)
    assert same != describe_judgement(Machine(), labels)
