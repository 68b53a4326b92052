"""Do what is still to be done for the CIFAR-10 tables, for so many seconds; the next call goes on.

    python zoo/cifar/slice.py --seconds 540 --at-once 5 --work WORK --out OUT --data-root DATA

For machines that are at hand for minutes only. Each step is a command of its own that anybody can give
(plan.py); those that the time runs out on are interrupted and go on in the next call. What was made is
packed into OUT in files of at most 15 MB, from which carry.py makes WORK again on another machine, and
installs the zoo: after each step, so that a machine that is taken away takes little along.

On a machine without internet give the folder of the wheels that it lacks: --wheels DIR.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from carry import LIMIT, pack, unpack
from cifar_rows import ROOT, ZOO
from plan import Options, Step, all_steps

GRACE = 20.0
SHORTEST = 20.0
POLL = 0.1
GPU_FLAGS = "--precision bf16-mixed --compile --cuda-graphs"


class _StopError(Exception):
    """The machine is asked for: stop and pack."""


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
@click.option("--at-once", default=1, show_default=True, help="Steps at work beside each other.")
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
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_time_up)
    environment = _environment(work, wheels, at_once)
    runner = _Runner(options, environment, commit or _commit(), has_gpu, at_once, out)
    try:
        runner.work_until(steps, end)
    except _StopError:
        click.echo("told to stop")
    for line in pack(work, out, LIMIT):
        click.echo(line)
    (out / "slice.json").write_text(json.dumps(runner.log, indent=1) + "\n", encoding="utf-8")


def _raise_time_up(*_: Any) -> None:
    raise _StopError


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


@dataclass(frozen=True)
class _Running:
    """A step at work, since when, and whether it goes on from an earlier call."""

    step: Step
    process: "subprocess.Popen[Any]"
    started: float
    resumed: bool


class _Runner:
    """Runs steps until the time is up, so many at once."""

    def __init__(
        self,
        options: Options,
        environment: dict[str, str],
        commit: str,
        has_gpu: bool,
        at_once: int = 1,
        out: Path | None = None,
    ) -> None:
        self.options, self.environment, self.out = options, environment, out
        self.commit, self.has_gpu, self.at_once = commit, has_gpu, at_once
        self.log: list[dict[str, Any]] = []
        self.running: list[_Running] = []

    def work_until(self, steps: list[Step], end: float) -> None:
        """Whatever can be done, in order; a step that fails is told of, and others are tried."""
        waiting = list(steps)
        try:
            while True:
                self._start_ready(waiting, end)
                if not self.running or time.monotonic() >= end:
                    break
                time.sleep(POLL)
                for one in [one for one in self.running if one.process.poll() is not None]:
                    self._finish(one)
        finally:
            for one in self.running:
                one.process.send_signal(signal.SIGINT)  # as Ctrl-C does: what is done is kept
            for one in list(self.running):
                _wait_or_kill(one.process)
                self._finish(one, cut_off=True)
        for step in waiting:
            if missing := [path.name for path in step.needs if not path.exists()]:
                click.echo(f"{step.name}: left out, needs {', '.join(missing)}")

    def _start_ready(self, waiting: list[Step], end: float) -> None:
        """Start steps that have what they need; those that are done, or can't be, are waited for no more."""
        for step in list(waiting):
            if step.made.exists():
                self._record(step, resumed=False)
                waiting.remove(step)
            elif step.gpu and not self.has_gpu:
                click.echo(f"{step.name}: left out, needs a GPU")
                waiting.remove(step)
            elif all(path.exists() for path in step.needs) and end - time.monotonic() > SHORTEST:
                alone = step.alone or any(one.step.alone for one in self.running)
                if len(self.running) >= (1 if alone else self.at_once):
                    return
                waiting.remove(step)
                self._start(step)

    def _start(self, step: Step) -> None:
        resumed = step.state is not None and step.state.is_dir()
        command = [*step.command, *(["--resume"] if resumed else [])]
        click.echo(f"{step.name}: {datetime.now(UTC):%H:%M:%S}{', goes on' if resumed else ''}")
        with self._log_of(step).open("a", encoding="utf-8") as output:
            process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=output, stderr=output)
        self.running.append(_Running(step, process, time.monotonic(), resumed))

    def _log_of(self, step: Step) -> Path:
        return self.options.work / "logs" / f"{step.name}.log"

    def _finish(self, one: _Running, cut_off: bool = False) -> None:
        """Tell what became of a step that has ended."""
        self.running.remove(one)
        step, taken = one.step, round(time.monotonic() - one.started, 1)
        code = f"failed, code {one.process.returncode}"
        state = "done" if step.made.exists() else "cut off" if cut_off else code
        self.log.append({"step": step.name, "seconds": taken, "state": state})
        click.echo(f"{step.name}: {state} after {taken:.0f} s")
        if state == "done":
            self._record(step, one.resumed)
            if self.out is not None:
                list(pack(self.options.work, self.out, LIMIT))  # the end tells what does not fit
        elif not cut_off:
            told = self._log_of(step).read_text(encoding="utf-8")
            click.echo("".join(told.splitlines(keepends=True)[-15:]))

    def _record(self, step: Step, resumed: bool) -> None:
        """The result file of a finished run."""
        if step.result is None:
            return
        row, method, seed = step.result
        path = self.options.work / "results" / row.name / f"{method}-{seed}.json"
        if path.exists():
            return
        sys.path.append(str(ZOO / "paper"))  # reports are read as the paper's tables read them
        figures = importlib.import_module("tables").figures
        report = json.loads(step.made.read_text(encoding="utf-8"))
        content = figures(report) | {
            "row": row.name,
            "method": method,
            "seed": seed,
            "command": self._shown(step),
            "commit": self.commit,
            "resumed": resumed,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _shown(self, step: Step) -> str:
        """The command as anybody may give it, without this machine's folders."""
        told = " ".join(step.command[: len(step.command) - len(self.options.reading)])
        for folder, name in (
            (f"{self.options.work / 'runs'}", ".runs"),
            (f"{self.options.work / 'zoo'}", "zoo"),
            (f"{self.options.zoo}", "zoo"),
            (f"{ROOT}/", ""),
            (f"{sys.executable} -m vbdcompress", "vbdcompress"),
            (sys.executable, "python"),
        ):
            told = told.replace(folder, name)
        return told


def _wait_or_kill(process: "subprocess.Popen[Any]") -> None:
    """What does not end within GRACE seconds is killed."""
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
