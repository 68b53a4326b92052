"""The command line in this process, and a finished run to look at."""

import pytest

from vbdcompress.cli.main import main

QUICK = ["--epochs", "2", "--finetune-epochs", "1"]


@pytest.fixture
def cli(capsys):
    """Run a command; (exit code, standard output, standard error)."""

    def run(*arguments):
        try:
            main([str(item) for item in arguments])
            code = 0
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, zoo):
    out = tmp_path_factory.mktemp("cli") / "digits"
    main(["run", str(zoo / "digits.pt"), "--out", str(out), *QUICK])
    return out
