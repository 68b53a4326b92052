"""Try every network of the coverage table in both modes, and torch-pruning alone beside them.

    python zoo/coverage/coverage.py                        # what has no result yet
    python zoo/coverage/coverage.py torchvision:resnet18 --mode channels --again

Each row is a process of its own; a result is a file in zoo/coverage/results. When they are there:
`python zoo/coverage/write_page.py`.
"""

import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import click
import torch
from check import check, check_torch_pruning
from networks import NETWORKS

RESULTS = Path(__file__).resolve().parent / "results"
MODES = ("channels", "weights", "torch-pruning")
# torch-pruning alone takes 23 GB and more than an hour for some: it gets this much
SECONDS, BYTES = 600, 12 << 30
# Of the machine's memory, for a row of ours: beyond it the row fails, and nothing else on the machine
SHARE = 0.8


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(NETWORKS)))
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Only this one.")
@click.option("--again", is_flag=True, help="Also where there is a result.")
@click.option("--here", is_flag=True, hidden=True, help="In this process: what each row's process is told.")
def main(names: tuple[str, ...], modes: tuple[str, ...], again: bool, here: bool) -> None:
    """Run what has no result yet."""
    RESULTS.mkdir(exist_ok=True)
    for name in names or NETWORKS:
        for mode in modes or MODES:
            path = RESULTS / f"{name.replace(':', '-')}-{mode}.json"
            if here:
                path.write_text(json.dumps(_row(name, mode), indent=1) + "\n", encoding="utf-8")
            elif again or not path.exists():
                failed = _start(name, mode)
                if failed:
                    row = {"network": name, "mode": mode, "failed": failed}
                    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
                row = json.loads(path.read_text(encoding="utf-8"))
                click.echo(f"{name} {mode}: {row.get('failed') or row.get('difference', 'ok')}")


def _start(name: str, mode: str) -> str:
    """Make a row in a process of its own; why it failed, empty where it did not."""
    command = [sys.executable, __file__, name, "--mode", mode, "--here"]
    limit = SECONDS if mode == "torch-pruning" else None
    try:
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s"
    if ended.returncode < 0:
        return f"killed by signal {-ended.returncode}, as a rule for want of memory"
    told = ended.stderr.strip().splitlines()[-1:] or [f"exit status {ended.returncode}"]
    if ended.returncode and ("allocate memory" in told[0] or told[0].startswith("MemoryError")):
        return f"needs more than the {_allowed(mode) >> 30} GB of memory that it may take here"
    return told[0] if ended.returncode else ""


def _allowed(mode: str) -> int:
    ours = int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return BYTES if mode == "torch-pruning" else ours


def _row(name: str, mode: str) -> dict[str, object]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (_allowed(mode), _allowed(mode)))
    return check_torch_pruning(NETWORKS[name]) if mode == "torch-pruning" else check(NETWORKS[name], mode)


if __name__ == "__main__":
    main()
