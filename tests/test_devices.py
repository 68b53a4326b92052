"""Who reads first, of the processes that torchrun started."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vbdcompress.config import FitConfig
from vbdcompress.devices import first_on_machine_first


class Recording:
    """A fabric of two processes that notes who is alone when."""

    world_size, global_rank = 2, 0

    def __init__(self) -> None:
        self.told: list[Any] = []

    @contextmanager
    def rank_zero_first(self, local: bool) -> Iterator[None]:
        self.told.append(("alone", local))
        yield
        self.told.append("together")


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_the_first_process_of_each_machine_reads_first(
    monkeypatch: pytest.MonkeyPatch, under_torchrun: bool
) -> None:
    fabric = Recording()
    monkeypatch.setattr("vbdcompress.devices.start_fabric", lambda _: fabric)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with first_on_machine_first(FitConfig()):
        fabric.told.append("reading")
    assert fabric.told == ([("alone", True), "reading", "together"] if under_torchrun else ["reading"])
