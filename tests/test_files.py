"""Files that are whole or not there, and damaged ones that are refused."""

import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch

from vbdcompress.errors import LoadError
from vbdcompress.files import load_tensors, replacing, save_tensors, write_text

CONTENT = {"config": {"epochs": 3}, "rows": [{"nll": 0.25}], "model": {"weight": torch.arange(300.0)}}


def test_replacing_puts_the_new_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.suffix == ".part"
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_replacing_leaves_the_old_file_when_the_block_fails(
    tmp_path: Path, error: type[BaseException], existed: bool
) -> None:
    path = tmp_path / "report.html"
    if existed:
        path.write_text("old")

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert [entry.read_text() for entry in tmp_path.iterdir()] == (["old"] if existed else [])


def test_write_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.md", "0.5 · log ä²\n")
    assert (tmp_path / "a.md").read_bytes() == "0.5 · log ä²\n".encode()


def test_save_tensors_and_load_tensors_are_inverse(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.ckpt", CONTENT)
    found = load_tensors(tmp_path / "a.ckpt")
    assert found["config"] == CONTENT["config"]
    assert found["rows"] == CONTENT["rows"]
    assert torch.equal(found["model"]["weight"], torch.arange(300.0))
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_save_tensors_keeps_the_old_file_where_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_tensors(path, CONTENT)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_tensors(path, {"model": lambda: None})
    assert load_tensors(path)["rows"] == CONTENT["rows"]
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.5, 0.8, 0.99])
def test_load_tensors_refuses_a_file_cut_short(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.ckpt"
    save_tensors(path, CONTENT)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LoadError, match=r"a\.ckpt': can't be read") as caught:
        load_tensors(path)
    assert "weights_only" not in str(caught.value)  # torch's advice is to read it unsafely


@pytest.mark.parametrize("content", [b"\x00" * 100, b"hello, world\n" * 9, b"\x80\x02}q\x00.", b"("])
def test_load_tensors_refuses_what_is_no_torch_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(LoadError, match="can't be read"):
        load_tensors(tmp_path / "a.ckpt")


def test_load_tensors_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="can't be read"):
        load_tensors(tmp_path / "a.ckpt")


def test_load_tensors_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save(Trap(), tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
        load_tensors(tmp_path / "a.ckpt")
    assert not (tmp_path / "run").exists()


def test_save_tensors_says_where_there_was_no_room(tmp_path: Path) -> None:
    path = tmp_path / "network.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # a write beyond the limit fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"network.pt' can't be written, the disk may be full"):
            save_tensors(path, CONTENT | {"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []
