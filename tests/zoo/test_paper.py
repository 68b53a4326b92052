"""The scripts under zoo/paper: they write what the result files say, and the rival is no straw man."""

import importlib
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from vbdcompress.architectures import build_architecture
from vbdcompress.config import make_config, read_toml
from vbdcompress.data import load_data
from vbdcompress.loading import load

PAPER = Path(__file__).parents[2] / "zoo" / "paper"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import a script of zoo/paper by name."""
    monkeypatch.syspath_prepend(str(PAPER))

    def read(name: str) -> ModuleType:
        return importlib.import_module(name)

    return read


def test_the_zoo_s_readme_is_what_the_result_files_say(script, tmp_path):
    done = CliRunner().invoke(script("write_readme").main, ["--out", str(tmp_path / "README.md")])
    assert done.exit_code == 0, done.output
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    committed = (PAPER.parent / "README.md").read_text(encoding="utf-8")
    assert written == committed, "run: python zoo/paper/write_readme.py"


def test_every_recipe_is_a_valid_configuration(script):
    rows = script("rows")
    recipes = sorted((PAPER.parent / "recipes").glob("*.toml"))
    assert recipes
    named = {row.recipe(method).name for row in rows.ROWS.values() for method in rows.METHODS}
    cifar = runpy.run_path(str(PAPER.parent / "cifar" / "cifar_rows.py"))
    named |= {row.recipe(method) for row in cifar["ROWS"].values() for method in row.methods}
    named |= {cifar["training_recipe"](network) for network in cifar["NETWORKS"]}
    for recipe in recipes:
        make_config(read_toml(recipe))
        assert recipe.name in named


def test_a_line_is_mean_and_spread_over_the_seeds(script, tmp_path):
    module = script("write_readme")
    assert module._line(tmp_path, "vbd", "VBD") is None
    for seed, (error, nonzeros) in enumerate([(1.5, 100), (1.7, 200)]):
        content = {
            "seed": seed,
            "test_error": error,
            "dense_test_error": 1.05,
            "size": {"nonzeros": nonzeros, "parameters": 1000, "macs": 500},
            "dense_size": {"nonzeros": 8000, "parameters": 8000, "macs": 8000},
            "kept": {"layers.0": 7, "layers.1": 5},
            "epochs": 3,
            "minutes": 4.0 + seed,
            "resumed": seed == 0,
            "device": "cpu",
            "commit": "abc",
            "command": f"vbdcompress run x.pt --seed {seed} --out .runs/x-vbd-{seed}",
        }
        if seed == 1:  # older files hold no weights
            content |= {"weights": 180, "dense_weights": 7200}
        (tmp_path / f"vbd-{seed}.json").write_text(json.dumps(content))
    line = module._line(tmp_path, "vbd", "VBD")
    assert line["error"] == "1.60 ± 0.14 %"  # the deviation of 1.5 and 1.7 is 0.2 / sqrt(2)
    assert line["ratios"]["nonzeros"] == "60.0 ± 28.3x"
    assert line["weights"] == "40.0x"  # 7200 / 180
    assert line["exported"] == "1.50 %"
    assert line["seeds"] == 2
    assert line["minutes"] == "5"  # of the whole run
    assert line["command"] == "vbdcompress run x.pt --seed SEED --out .runs/x-vbd-SEED"


@pytest.mark.parametrize("allowed", [500, 5000])
def test_magnitude_pruning_keeps_the_largest_weights(script, allowed):
    model = build_architecture("digits")
    before = [module.weight.detach().clone() for module in model.modules() if hasattr(module, "weight")]
    script("magnitude")._prune_weights_(model, allowed)
    assert script("rows").count_weights(model) == allowed
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    weights = [module.weight for module in model.modules() if hasattr(module, "weight")]
    pairs = [
        (old, new)
        for old, new in zip(before, weights, strict=True)
        if any(new is layer.weight for layer in layers)
    ]
    # Lee et al.: the smallest score kept, over all layers, is no smaller than the largest that went
    scores = [
        torch.stack([w**2 / (flat[flat.abs() >= w.abs()] ** 2).sum() for w in flat]).view_as(old)
        for old, _ in pairs
        for flat in [old.flatten()]
    ]
    kept = torch.cat([score[new != 0] for score, (_, new) in zip(scores, pairs, strict=True)])
    gone = torch.cat([score[new == 0] for score, (_, new) in zip(scores, pairs, strict=True)])
    assert kept.min() >= gone.max() * (1 - 1e-5)


def test_magnitude_pruning_cuts_channels_to_the_largest_network_allowed(script):
    torch.manual_seed(0)
    model, example = build_architecture("lenet5"), torch.randn(2, 1, 28, 28)
    allowed = 20_000
    found = script("magnitude")._prune_channels(model, example, allowed)
    count = sum(parameter.numel() for parameter in found.parameters())
    assert 0.9 * allowed < count <= allowed
    assert found(example).shape == (2, 10)


def test_the_rival_makes_as_many_passes_as_vbd(script):
    config = make_config(
        {"mode": "weights", "epochs": 50, "finetune_epochs": 7, "first": {"mode": "weights", "epochs": 5}}
    )
    assert script("magnitude")._epochs(config) == 62


RECIPE = """
mode = "weights"
beta = 2.0
epochs = 8
finetune_epochs = 2
threshold = 0.0
"""


@pytest.fixture
def tables(script, monkeypatch, tmp_path):
    """zoo/paper/tables.py with one row, on the small digits, that works and writes below tmp_path."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    rows = script("rows")

    class Row(rows.Row):
        def recipe(self, method):
            return tmp_path / "recipe.toml"

    row = Row("digits_weights", "digits", "weights", "Digits", 1, "-", "-")
    monkeypatch.setattr(script("magnitude"), "RESULTS", tmp_path / "results")
    places = {"ROWS": {row.name: row}, "RESULTS": tmp_path / "results", "WORK": tmp_path / "work"}
    for place, value in places.items():
        monkeypatch.setattr(script("tables"), place, value)
    monkeypatch.setattr(script("tables").shutil, "copytree", lambda *_, **__: None)  # into exports
    return script("tables")


def do(tables, capsys):
    """Have VBD's run done; what the script said."""
    tables.main.callback(("digits_weights",), ("vbd",), (), Path("none"))
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_is_then_skipped(tables, capsys):
    row = tables.ROWS["digits_weights"]
    out = tables.WORK / "digits_weights-vbd-0"
    command = tables._command(row, "vbd", 0, out)
    run = subprocess.Popen([sys.executable, "-m", *command], cwd=tables.ROOT, stdout=subprocess.DEVNULL)
    while run.poll() is None and not list(out.glob(".state/*.ckpt")):
        time.sleep(0.05)
    run.kill()
    assert run.wait() != 0, "it was over before it could be killed"
    do(tables, capsys)
    result = json.loads((tables.RESULTS / row.name / "vbd-0.json").read_text())
    assert result["resumed"] is True
    assert result["epochs"] == 10
    assert result["weights"] < result["size"]["nonzeros"]  # biases count there, too
    assert result["dense_weights"] == 16 * 9 + 32 * 16 * 9 + 64 * 128 + 10 * 64
    assert do(tables, capsys) == "digits_weights vbd seed 0: done\n"


def test_magnitude_pruning_goes_on_where_it_was_cut_off(script, tables, monkeypatch, tmp_path):
    magnitude, row = script("magnitude"), tables.ROWS["digits_weights"]
    (tables.RESULTS / row.name).mkdir(parents=True)
    (tables.RESULTS / row.name / "vbd-0.json").write_text('{"weights": 2000, "size": {"nonzeros": 2090}}')
    data, dense = load_data("digits"), load(row.checkpoint).model.eval()
    config = make_config(read_toml(row.recipe("vbd")) | {"epochs": 8})  # and 2 epochs more: one a round
    fits, fit = [], magnitude.fit

    def prune(name, resume, interrupted_after=None):
        def counting(*arguments, **options):
            if len(fits) == interrupted_after:
                raise KeyboardInterrupt
            fits.append(options["checkpoint"].path.name)
            return fit(*arguments, **options)

        fits.clear()
        monkeypatch.setattr(magnitude, "fit", counting)
        (tmp_path / name).mkdir(exist_ok=True)
        return magnitude._prune_in_rounds(dense, data, config, row, tmp_path / name, resume)

    whole = prune("whole", resume=False)
    with pytest.raises(KeyboardInterrupt):
        prune("cut", resume=False, interrupted_after=4)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    assert len(written) == 4
    resumed = prune("cut", resume=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written  # not trained again
    assert script("rows").count_weights(resumed) == 2000
    for expected, found in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, found)
