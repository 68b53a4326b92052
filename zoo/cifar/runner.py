"""Steps at work: several beside each other, those that have what they need, until the time is up."""

import importlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from carry import LIMIT, pack
from cifar_rows import ROOT, ZOO
from plan import Options, Step

GRACE = 20.0
SHORTEST = 20.0
POLL = 0.1


@dataclass(frozen=True)
class _Running:
    """A step at work, since when, and whether it goes on from an earlier call."""

    step: Step
    process: "subprocess.Popen[Any]"
    started: float
    resumed: bool


class Runner:
    """Runs steps until the time is up.

    Args:
        options: what the steps were made with.
        environment: of the steps.
        commit: that the results name.
        has_gpu: else steps that need one are left out.
        at_once: how many steps may run beside each other.
        out: folder that is packed into after each step; None packs nothing.
    """

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
        self.told_to_stop = False  # set by a signal, seen where no step is about to be started

    def work_until(self, steps: list[Step], end: float) -> None:
        """Whatever can be done, in order; a step that fails is told of, and others are tried."""
        waiting = list(steps)
        try:
            while not self.told_to_stop:
                self._start_ready(waiting, end)
                if not self.running or time.monotonic() >= end:
                    break
                time.sleep(POLL)
                for one in self._ended():
                    self._finish(one)
        finally:
            for one in self._ended():
                self._finish(one)
            self._stop_all()
        for step in waiting:
            if missing := [path.name for path in step.needs if not path.exists()]:
                click.echo(f"{step.name}: left out, needs {', '.join(missing)}")

    def _ended(self) -> list[_Running]:
        return [one for one in self.running if one.process.poll() is not None]

    def _stop_all(self) -> None:
        """Interrupt what runs, as Ctrl-C does: what is done is kept. After GRACE seconds it is killed."""
        for one in self.running:
            one.process.send_signal(signal.SIGINT)
        end = time.monotonic() + GRACE
        while len(self._ended()) < len(self.running) and time.monotonic() < end:
            time.sleep(POLL)
        for one in list(self.running):
            one.process.kill()  # nothing where it has ended
            one.process.wait()
            self._finish(one, cut_off=True)

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
            (f"{sys.executable} -m vbdcompress", "vbdcompress"),  # before ROOT, in which it may lie
            (sys.executable, "python"),
            (f"{self.options.work / 'runs'}", ".runs"),
            (f"{self.options.work / 'zoo'}", "zoo"),
            (f"{self.options.zoo}", "zoo"),
            (f"{ROOT}/", ""),
        ):
            told = told.replace(folder, name)
        return told
