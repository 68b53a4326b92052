"""The coverage table: a sample of its rows anew, the whole of them with -m slow, and its page."""

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

COVERAGE = Path(__file__).parents[2] / "zoo" / "coverage"
# Squeeze-excite beside depthwise; groups with squeeze-excite; shuffled halves; fused attention; a pyramid
SAMPLE = [
    pytest.param("torchvision:mobilenet_v3_small", "channels", marks=pytest.mark.slow),
    pytest.param("torchvision:regnet_y_400mf", "channels", marks=pytest.mark.slow),
    pytest.param("torchvision:shufflenet_v2_x0_5", "channels", marks=pytest.mark.slow),
    pytest.param("timm:deit_tiny_patch16_224", "weights", marks=pytest.mark.slow),
    ("detection:resnet18_fpn", "channels"),
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import a script of zoo/coverage by name."""
    monkeypatch.syspath_prepend(str(COVERAGE))

    def read(name: str) -> ModuleType:
        return importlib.import_module(name)

    return read


def assert_whole_way(row: dict[str, Any]) -> None:
    assert "failed" not in row, row["failed"]
    assert row["step"] == "ok"
    assert row["difference"] <= 1e-10
    assert row["onnx_difference"] <= 1e-4
    assert row["reload_difference"] == 0.0


@pytest.mark.parametrize(("name", "mode"), SAMPLE)
def test_a_sample_of_families_goes_the_whole_way(script: Any, name: str, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        row = script("check").check(script("networks").NETWORKS[name], mode)
    assert_whole_way(row)
    assert row["parameters_left"] < row["parameters"] or mode == "weights"


@pytest.mark.slow
@pytest.mark.timeout(20 * 3600)
@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_every_network_goes_the_whole_way(script: Any, mode: str) -> None:
    failed = {}
    for name, network in script("networks").NETWORKS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = script("check").check(network, mode)
        try:
            assert_whole_way(row)
        except AssertionError as error:
            failed[name] = str(error)
    assert not failed


def test_the_page_is_what_the_result_files_say(script: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(script("write_page").main, ["--out", str(tmp_path / "coverage.md")])
    assert done.exit_code == 0, done.output
    written = (tmp_path / "coverage.md").read_text(encoding="utf-8")
    committed = (COVERAGE.parent / "coverage.md").read_text(encoding="utf-8")
    assert written == committed, "run: python zoo/coverage/write_page.py"
    for network in script("networks").NETWORKS:  # no silent row
        assert f"| {network.replace('torchvision:', '')} |" in written


def test_a_row_that_failed_says_so(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("write_page")
    monkeypatch.setattr(module, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    failed = {"network": "timm:x", "mode": "channels", "failed": "it | broke\nhere"}
    (tmp_path / "results" / "timm-x-channels.json").write_text(json.dumps(failed))
    assert module._row("timm:x", "channels")["failed"] == "it / broke here"
    assert module._row("timm:x", "weights")["failed"] == "not run yet"
