"""Waiting for what other processes write."""

import time
from pathlib import Path


def wait_for(path: Path, seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)
