"""Do what is still to be done for the CIFAR-10 tables, for so many seconds; the next call goes on.

    python zoo/cifar/slice.py --seconds 540 --at-once 5 --work WORK --out OUT --data-root DATA

For machines that are at hand for minutes only. Each step is a command of its own that anybody can give
(plan.py); those that the time runs out on are interrupted and go on in the next call. What was made is
packed into OUT in files of at most 15 MB, from which carry.py makes WORK again on another machine, and
installs the zoo: after each step, so that a machine that is taken away takes little along.

On a machine without internet give the folder of the wheels that it lacks: --wheels DIR.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from carry import LIMIT, pack, unpack
from cifar_rows import ROOT, ZOO
from plan import Options, Step, all_steps
from runner import Runner

GPU_FLAGS = "--precision bf16-mixed --compile --cuda-graphs"


@click.command()
@click.option("--seconds", default=540.0, show_default=True, help="To work; packing comes on top.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of all that is made.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of what is to be taken along."
)
@click.option("--carry", type=click.Path(path_type=Path), help="OUT of an earlier call, to begin with.")
@click.option("--data", default="cifar10", show_default=True, help="Data set: a name or an .npz.")
@click.option("--data-root", envvar="VBDCOMPRESS_DATA", type=click.Path(path_type=Path))
@click.option(
    "--zoo", default=ZOO, type=click.Path(path_type=Path), help="Dense networks at hand, and recipes."
)
@click.option(
    "--arch-arg", "arch_args", multiple=True, metavar="KEY=VALUE", help="Of VGG's builder: width=0.25."
)
@click.option("--machine", help=f"Flags of every run.  [default: '{GPU_FLAGS}' with a GPU, else none]")
@click.option(
    "--at-once",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Steps at work beside each other.",
)
@click.option("--only", multiple=True, metavar="STEP", help="Only these steps.")
@click.option(
    "--wheels", type=click.Path(path_type=Path, exists=True), help="Folder of wheels to install first."
)
@click.option("--commit", help="That the results name; without it git is asked.")
@click.option("--list", "show", is_flag=True, help="Say what is done and what is not, and stop.")
def main(
    seconds: float,
    work: Path,
    out: Path,
    carry: Path | None,
    data: str,
    data_root: Path | None,
    zoo: Path,
    arch_args: tuple[str, ...],
    machine: str | None,
    at_once: int,
    only: tuple[str, ...],
    wheels: Path | None,
    commit: str | None,
    show: bool,
) -> None:
    """Work, then pack."""
    end = time.monotonic() + seconds
    work, zoo = work.resolve(), zoo.resolve()
    if carry is not None:
        unpack(carry, work)
    for name in ("dense", "zoo", "runs", "results", "logs"):
        (work / name).mkdir(parents=True, exist_ok=True)
    has_gpu = shutil.which("nvidia-smi") is not None
    flags = (GPU_FLAGS if has_gpu else "") if machine is None else machine
    options = Options(work, zoo, data, data_root, arch_args, tuple(flags.split()))
    steps = [step for step in all_steps(options) if not only or step.name in only]
    if show:
        for step in steps:
            click.echo(f"{step.name}: {_standing(step)}")
        return
    environment = _environment(work, wheels, at_once)
    runner = Runner(options, environment, commit or _commit(), has_gpu, at_once, out)

    def stop(*_: Any) -> None:
        runner.told_to_stop = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    runner.work_until(steps, end)
    if runner.told_to_stop:
        click.echo("told to stop")
    for line in pack(work, out, LIMIT):
        click.echo(line)
    (out / "slice.json").write_text(json.dumps(runner.log, indent=1) + "\n", encoding="utf-8")


def _standing(step: Step) -> str:
    if step.made.exists():
        return "done"
    return "cut off" if step.state is not None and step.state.is_dir() else "to do"


def _environment(work: Path, wheels: Path | None, at_once: int) -> dict[str, str]:
    """Of the steps: this package, the wheels that were given, a share of the processor's cores each, and
    compiled code kept between calls.
    """
    site = work / "site"
    if wheels is not None and not site.is_dir():
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--target",
            str(site),
        ]
        subprocess.run([*pip, *files], check=True)
    paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    cores = max(1, (os.cpu_count() or 1) // at_once)
    return (
        {"OMP_NUM_THREADS": str(cores)}
        | os.environ
        | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "PYTHONUNBUFFERED": "1",
        }
    )


def _commit() -> str:
    """The commit at hand; where there is no git, nobody knows."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    if shutil.which("git") is None:
        return "unknown"
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
