"""Commands on a simulated device: `python simulated.py LIBRARY train ... + run zoo/digits.pt ...`.

LIBRARY is simulated.cpp compiled, see `compile_library`. Everything runs as it would on a GPU: networks and
batches are moved there, and an operation on tensors of both sides raises. In a process of its own, for torch
knows only one such device, and no way back.
"""

import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning_fabric
import torch
from lightning_fabric.accelerators import Accelerator
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.strategies import SingleDeviceStrategy

import vbdcompress.devices
from vbdcompress.cli import main

NAME = "simulated"


def compile_library(folder: Path) -> Path:
    """Compile the device; FileNotFoundError where there is no compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("c++")
    library, root = folder / "simulated.so", Path(torch.__file__).parent
    found = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-w", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = str(Path(__file__).with_suffix(".cpp"))
    subprocess.run([compiler, source, *found, *flags, "-o", str(library)], check=True)
    return library


class Backend:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """The CPU's generator draws."""

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


class Simulated(Accelerator):
    """What Fabric asks of it."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""

    def teardown(self) -> None:
        """Nothing to take down."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def start(precision: Any, **_: Any) -> lightning_fabric.Fabric:
    """Fabric with this device, whichever was asked for."""
    strategy = SingleDeviceStrategy(torch.device(NAME, 0), accelerator=Simulated())
    plugin = MixedPrecision(precision, device=NAME) if precision == "bf16-mixed" else Precision()
    return lightning_fabric.Fabric(strategy=strategy, plugins=plugin)


if __name__ == "__main__":
    torch.ops.load_library(sys.argv.pop(1))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Backend)
    torch.utils.generate_methods_for_privateuse1_backend()
    # Parameters stay the objects that they were where a network moves, as they do on a GPU
    torch.__future__.set_swap_module_params_on_conversion(True)
    vbdcompress.devices.Fabric = start
    for _, words in groupby(sys.argv[1:], key=lambda word: word == "+"):
        given = list(words)
        if given != ["+"]:
            main(given)
