"""Redo the paper's tables: every run that has no result yet, one after the other.

    python zoo/paper/tables.py --data-root DATA                          # all of them
    python zoo/paper/tables.py lenet_300_100_weights --method vbd --seed 0 --data-root DATA

A run that is cut off goes on where it stopped when the command is given again; one that has a result in
zoo/paper/results is skipped. When all are there: `python zoo/paper/write_readme.py`.
"""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rows import METHODS, RESULTS, ROOT, ROWS, Row, count_weights

from vbdcompress.exporting.slim_file import load_slim
from vbdcompress.loading import load

WORK = ROOT / ".runs"
SLIM_FILE = "slim.safetensors"


@click.command()
@click.argument("rows", nargs=-1, type=click.Choice(list(ROWS)))
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="Only this one.")
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(min=0), help="Only this one.")
@click.option("--data-root", required=True, envvar="VBDCOMPRESS_DATA", type=click.Path(path_type=Path))
def main(rows: tuple[str, ...], methods: tuple[str, ...], seeds: tuple[int, ...], data_root: Path) -> None:
    """Run what has no result yet."""
    for name in rows or ROWS:
        row = ROWS[name]
        for seed in seeds or range(row.seeds):
            for method in methods or METHODS:  # VBD first: the others are brought to its size
                result = RESULTS / row.name / f"{method}-{seed}.json"
                if result.exists():
                    click.echo(f"{row.name} {method} seed {seed}: done")
                else:
                    click.echo(f"{row.name} {method} seed {seed}: {datetime.now(UTC):%H:%M}")
                    _run(row, method, seed, data_root, result)


def _run(row: Row, method: str, seed: int, data_root: Path, result: Path) -> None:
    """One run, as a command of its own that anybody can give, and its result file."""
    out = WORK / f"{row.name}-{method}-{seed}"
    commit, command = _commit(), _command(row, method, seed, out)
    started = [sys.executable, *(command[1:] if command[0] == "python" else ["-m", *command])]
    resumed = (out / ".state").is_dir()
    flags = ["--resume"] if resumed else []
    subprocess.run([*started, *flags, "--data-root", str(data_root)], cwd=ROOT, check=True)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    content = figures(report) | {
        "weights": report["weights"] if method == "magnitude" else count_weights(load_slim(out / SLIM_FILE)),
        "dense_weights": count_weights(load(row.checkpoint).model),
        "row": row.name,
        "method": method,
        "seed": seed,
        "command": " ".join(command),
        "commit": commit,
        "resumed": resumed,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if method == "vbd" and seed == 0:
        shutil.copytree(out, ROOT / "exports" / row.name, dirs_exist_ok=True)


def _command(row: Row, method: str, seed: int, out: Path) -> list[str]:
    """What anybody can give in the root of the project, with a data root."""
    if method == "magnitude":
        program = ["python", "zoo/paper/magnitude.py", row.name]
    else:
        program = [
            "vbdcompress",
            "run",
            _from_root(row.checkpoint),
            "--config",
            _from_root(row.recipe(method)),
        ]
    return [*program, "--seed", str(seed), "--out", _from_root(out)]


def _from_root(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """What the tables show of a report."""
    after, before = report["size"]["after"], report["size"]["before"]
    groups = [group for stage in report["stages"] for group in stage["groups"]]
    kept = {group["name"]: group["kept"] for group in groups if group["whole_because"] is None}
    return {
        "test_error": report["errors"]["test"]["after"],
        "dense_test_error": report["errors"]["test"]["before"],
        "validation_error": report["errors"]["validation"]["after"],
        "size": after,
        "dense_size": before,
        "kept": kept,
        "minutes": round(report["seconds"] / 60, 1),
        "epochs": sum(len(stage["epochs"]) for stage in report["stages"]) + len(report["finetune"]),
        "device": report["environment"]["device"],
    }


def _commit() -> str:
    """The commit that runs, with a mark where the package or its recipes were changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    status = subprocess.run(
        [*git, "status", "--porcelain", "vbdcompress", "zoo/recipes", "zoo/paper/magnitude.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


if __name__ == "__main__":
    main()
