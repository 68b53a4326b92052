"""Write zoo/README.md from the result files; nothing in its tables is typed by hand.

python zoo/paper/write_readme.py
"""

import json
import runpy
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from jinja2 import Environment, StrictUndefined
from rows import METHOD_NAMES, METHODS, RESULTS, ROWS, ZOO, Row

TEMPLATE = Path(__file__).with_name("README.md.jinja")
EPOCHS = ZOO / "benchmarks" / "epoch_cost_cuda.json"
BENCHMARKS = ("step_cost.json", "step_cost_cifar.json", "step_cost_cuda.json")
CIFAR = runpy.run_path(str(ZOO / "cifar" / "cifar_rows.py"))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ZOO / "README.md", help="File to write.")
def main(out: Path) -> None:
    """Read all result files and render the template."""
    tables = {
        mode: [_describe(row) for row in ROWS.values() if row.mode == mode]
        for mode in ("weights", "channels")
    }
    benchmarks = [ZOO / "benchmarks" / name for name in BENCHMARKS]
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        tables=tables,
        benchmarks=[json.loads(path.read_text(encoding="utf-8")) for path in benchmarks if path.exists()],
        epochs=json.loads(EPOCHS.read_text(encoding="utf-8")) if EPOCHS.exists() else None,
        cifar=[_describe_cifar(row) for row in CIFAR["ROWS"].values()],
        cifar_networks=list(CIFAR["NETWORKS"].values()),
        bits=_read("bits"),
        deploy=_read("deploy"),
        channels=_read("channels"),
        runtimes=_read("runtimes"),
    )
    out.write_text(text, encoding="utf-8")


def _read(name: str) -> Any:
    """What zoo/deploy/NAME.py wrote; None where it has not run."""
    path = ZOO / "deploy" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _describe(row: Row) -> dict[str, Any]:
    """A row of a table: the paper's figures and a line for each method that has results."""
    lines = [_line(RESULTS / row.name, method, METHOD_NAMES[method]) for method in METHODS]
    return {
        "title": row.title,
        "name": row.name,
        "paper": row.paper,
        "goal": row.goal,
        "seeds": row.seeds,
        "lines": [line for line in lines if line],
    }


def _describe_cifar(row: Any) -> dict[str, Any]:
    """The same for CIFAR-10."""
    lines = [
        _line(CIFAR["RESULTS"] / row.name, method, CIFAR["METHOD_NAMES"][method]) for method in row.methods
    ]
    return {
        "title": ", ".join(
            filter(None, (CIFAR["NETWORKS"][row.network].title, row.mode, row.size, row.before and "before"))
        ),
        "name": row.name,
        "elsewhere": row.elsewhere,
        "goal": row.goal,
        "remark": row.remark,
        "lines": [line for line in lines if line],
    }


def _line(results: Path, method: str, title: str) -> dict[str, Any] | None:
    """Mean and spread of one method over its seeds; None where no run is finished.

    Args:
        results: folder of the row's result files.
    """
    paths = sorted(results.glob(f"{method}-*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not runs:
        return None
    ratios = {
        field: [run["dense_size"][field] / run["size"][field] for run in runs]
        for field in ("nonzeros", "parameters", "macs")
    }
    counted = [run["dense_weights"] / run["weights"] for run in runs if "weights" in run]
    exported = [run for run in runs if run["seed"] == 0 and method == "vbd"]
    whole = [run["minutes"] for run in runs if not run["resumed"]]  # a resumed one counts its last part alone
    return {
        "method": title,
        "error": _spread([run["test_error"] for run in runs], 2, " %"),
        "dense": f"{runs[0]['dense_test_error']:.2f} %",
        "ratios": {field: _spread(values, 1, "x") for field, values in ratios.items()},
        "weights": _spread(counted, 1, "x") if counted else "",
        "millions": {field: f"{mean(run['size'][field] for run in runs) / 1e6:.2f}M" for field in ratios},
        "devices": ", ".join(sorted({run["device"] for run in runs})),
        "kept": "-".join(str(count) for count in runs[0]["kept"].values()),
        "exported": f"{exported[0]['test_error']:.2f} %" if exported else "",
        "seeds": len(runs),
        "epochs": runs[0]["epochs"],
        "minutes": f"{mean(whole):.0f}" if whole else "resumed",
        "commits": ", ".join(sorted({run["commit"] for run in runs})),
        "command": runs[0]["command"]
        .replace("--seed 0", "--seed SEED")
        .replace(f"-{runs[0]['seed']}", "-SEED"),
    }


def _spread(values: list[float], digits: int, unit: str) -> str:
    """Mean and standard deviation over the seeds."""
    told = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        told += f" ± {stdev(values):.{digits}f}"
    return told + unit


if __name__ == "__main__":
    main()
