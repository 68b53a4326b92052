"""The scripts of the zoo, to be called here."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ZOO = Path(__file__).parents[2] / "zoo"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import a script of zoo/cifar by name."""
    monkeypatch.syspath_prepend(str(ZOO / "cifar"))

    def read(name: str) -> ModuleType:
        return importlib.import_module(name)

    return read
