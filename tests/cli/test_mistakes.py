"""What goes wrong around a command ends in a sentence, and leaves nothing behind."""

import json
import os
import subprocess
import sys


def test_report_names_what_a_report_lacks(cli, finished, tmp_path):
    content = json.loads((finished / "report.json").read_text())
    for key, value in (("layers", None), ("size", {}), ("source", ...)):
        changed = {name: entry for name, entry in content.items() if name != key or value is not ...}
        changed |= {} if value is ... else {key: value}
        (tmp_path / "report.json").write_text(json.dumps(changed))
        code, _, err = cli("report", tmp_path)
        assert code == 1
        assert "lacks what a report holds, or holds it otherwise" in err


def test_what_no_memory_holds_is_told_in_a_sentence(cli, zoo):
    code, _, err = cli("inspect", zoo / "digits.pt", "--input-shape", "1,1000000,1000000")
    assert code == 1
    assert err.startswith("Error: there is not enough memory")


def test_run_refuses_a_folder_that_no_file_could_name(cli, zoo):
    code, _, err = cli("run", zoo / "digits.pt", "--out", os.fsdecode(b"out\xe9"))
    assert code == 2
    assert "is no UTF-8" in err


def test_a_run_that_can_not_print_leaves_no_state(zoo, tmp_path):
    read, write = os.pipe()
    os.close(read)  # nobody listens
    command = [sys.executable, "-m", "vbdcompress", "run", str(zoo / "digits.pt"), "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(zoo.parent)}
    with os.fdopen(write, "w") as nobody:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=nobody, stderr=subprocess.DEVNULL, env=environment, check=False
        )
    assert done.returncode
    assert not (tmp_path / "out").exists()
