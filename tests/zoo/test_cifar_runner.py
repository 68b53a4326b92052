"""zoo/cifar/runner.py: steps beside each other, until the time is up or a signal comes."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from waiting import wait_for

ZOO = Path(__file__).parents[2] / "zoo"


def test_steps_run_beside_each_other_but_those_that_measure(script: Any, tmp_path: Path) -> None:
    plan, spans = script("plan"), tmp_path / "spans"
    spans.mkdir()

    def step(name: str, *needs: str, alone: bool = False) -> Any:
        told = spans / name
        code = (
            f"import time, pathlib; a = time.time(); time.sleep(0.7); pathlib.Path({str(told)!r}).write_text("
        )
        command = (sys.executable, "-c", code + "f'{a} {time.time()}')")
        return plan.Step(name, command, told, needs=tuple(spans / each for each in needs), alone=alone)

    steps = [step("one"), step("after_one", "one"), step("two"), step("timing", alone=True), step("three")]
    (tmp_path / "logs").mkdir()
    options = plan.Options(tmp_path, ZOO, "cifar10", None)
    runner = script("runner").Runner(options, dict(os.environ), "abc", False, at_once=3)
    runner.work_until(steps, time.monotonic() + 100)
    assert {entry["step"]: entry["state"] for entry in runner.log} == {one.name: "done" for one in steps}
    begun, ended = {}, {}
    for path in spans.iterdir():
        begun[path.name], ended[path.name] = map(float, path.read_text().split())
    assert begun["after_one"] > ended["one"]
    assert begun["two"] < ended["one"]
    others = [name for name in begun if name != "timing"]
    assert all(begun[name] > ended["timing"] or ended[name] < begun["timing"] for name in others)


def test_what_was_made_is_packed_step_by_step(script: Any, tmp_path: Path) -> None:
    plan, out = script("plan"), tmp_path / "out"
    seen = tmp_path / "seen"
    first = tmp_path / "results" / "one.json"
    first.parent.mkdir()
    (tmp_path / "logs").mkdir()
    writes = f"import pathlib; pathlib.Path({str(first)!r}).write_text('1')"
    packed = f"pathlib.Path({str(out)!r}, 'carry.00').exists()"
    looks = f"import pathlib; pathlib.Path({str(seen)!r}).write_text(str({packed}))"
    steps = [
        plan.Step("one", (sys.executable, "-c", writes), first),
        plan.Step("two", (sys.executable, "-c", looks), seen, needs=(first,)),
    ]
    options = plan.Options(tmp_path, ZOO, "cifar10", None)
    script("runner").Runner(options, dict(os.environ), "abc", False, out=out).work_until(
        steps, time.monotonic() + 100
    )
    assert seen.read_text() == "True"


DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


def test_the_end_comes_for_all_steps_at_once(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    plan, runner = script("plan"), script("runner")
    monkeypatch.setattr(runner, "GRACE", 3.0)
    (tmp_path / "logs").mkdir()
    steps = [
        plan.Step(name, (sys.executable, "-c", DEAF), tmp_path / name)
        for name in ("one", "two", "three", "four")
    ]
    steps.append(plan.Step("fails", (sys.executable, "-c", "raise SystemExit(3)"), tmp_path / "none"))
    at_work = runner.Runner(plan.Options(tmp_path, ZOO, "cifar10", None), dict(os.environ), "abc", False, 5)
    monkeypatch.setattr(runner, "SHORTEST", 0.0)
    started = time.monotonic()
    at_work.work_until(steps, started + 2.0)
    assert time.monotonic() - started < 2.0 + 2 * runner.GRACE  # not GRACE for each of four
    states = {entry["step"]: entry["state"] for entry in at_work.log}
    assert states == dict.fromkeys(("one", "two", "three", "four"), "cut off") | {"fails": "failed, code 3"}
    assert at_work.running == []


def test_a_signal_is_seen_between_steps(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    plan, runner = script("plan"), script("runner")
    monkeypatch.setattr(runner, "GRACE", 1.0)  # in a shell's background the step does not hear of it
    (tmp_path / "logs").mkdir()
    code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)"
    step = plan.Step("one", (sys.executable, "-c", code), tmp_path / "made")
    at_work = runner.Runner(plan.Options(tmp_path, ZOO, "cifar10", None), dict(os.environ), "abc", False)

    def tell() -> None:
        wait_for(tmp_path / "begun")
        at_work.told_to_stop = True

    threading.Thread(target=tell).start()
    started = time.monotonic()
    at_work.work_until([step], started + 50.0)
    assert time.monotonic() - started < 40.0
    assert [entry["state"] for entry in at_work.log] == ["cut off"]
