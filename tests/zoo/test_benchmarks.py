"""zoo/benchmarks/epoch_cost.py: which epochs count, and what is written down."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "zoo" / "benchmarks"
SMALL = ["--arch-arg", "width=0.02", "--images", "40", "--batch-size", "20", "--device", "cpu"]


@pytest.fixture
def epoch_cost(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import epoch_cost

    return epoch_cost


def test_an_epoch_is_the_median_after_the_first_two(
    epoch_cost: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def fit(model: Any, batches: Any, config: Any, teacher: Any) -> Any:
        asked.append((config.epochs, config.compile, config.cuda_graphs, teacher is not None))
        return SimpleNamespace(epochs=[SimpleNamespace(seconds=each) for each in (9.0, 5.0, 1.0, 8.0, 2.0)])

    monkeypatch.setattr(epoch_cost, "fit", fit)
    arguments = [*SMALL, "--epochs", "3", "--variants", "plain,taught", "--out", str(tmp_path / "e.json")]
    done = CliRunner().invoke(epoch_cost.main, arguments)
    assert done.exit_code == 0, done.output
    ways = [(False, False), (True, False), (True, True)]
    assert asked == [(5, *way, taught) for taught in (False, True) for way in ways]
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert {(row["seconds"], row["first"]) for row in rows} == {(2.0, 10.0)}
    assert [row["way"] for row in rows] == ["eager", "compiled", "graphs"] * 2


def test_every_variant_runs(epoch_cost: Any) -> None:
    done = CliRunner().invoke(epoch_cost.main, [*SMALL, "--epochs", "1", "--ways", "eager"])
    assert done.exit_code == 0, done.output
    told = [line.split()[1] for line in done.output.splitlines() if "an epoch" in line]
    assert told == ["plain", "channels", "taught", "weights"]
