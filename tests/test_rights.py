"""Files for others: modes follow the umask, a missing right is one message, another user works with what we wrote."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models.command import run_command
from models.files import naming, write_text
from tests import train_factory
from tests.others import NOBODY
from tests.train_factory import ROOT

WRITE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from models.files import publish, write_whole
folder = Path(sys.argv[1])
tensors = {"a": torch.ones(1)}
write_whole(folder / "file", lambda path: save_file(tensors, path))
(folder / "new" / "below").mkdir(parents=True)
save_file(tensors, folder / "new" / "below" / "weights")
save_file(tensors, folder / "private")
(folder / "new" / "link").symlink_to(folder / "private")
publish(folder / "new", folder / "whole")
"""


def strange_modes(folder: Path, umask: int) -> list[str]:
    """What below a folder has another mode than the umask gives."""
    every = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    given = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in every}
    return [f"{path}: {mode:03o}" for path, mode in modes.items() if mode != given[path.is_dir()]]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_what_safetensors_writes_follows_the_umask_and_what_is_not_ours_stays(tmp_path, umask):
    folder = tmp_path / "all"
    subprocess.run(
        [sys.executable, "-c", f"import os; os.makedirs({str(folder)!r})"], umask=umask, check=True
    )
    environment = train_factory.environment()
    command = [sys.executable, "-c", WRITE, str(folder)]
    subprocess.run(command, umask=umask, check=True, env=environment, cwd=ROOT)
    private = folder / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    private.unlink()
    assert strange_modes(folder, umask) == []


def without_rights(folder: Path) -> None:
    os.seteuid(NOBODY)
    try:
        write_text(folder / "mine" / "x", "")
    finally:
        os.seteuid(0)


def in_rust(folder: Path) -> None:
    with naming(folder / "weights"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


TROUBLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "right": (without_rights, "mine: Permission denied. Remedy: the right"),
    "file for folder": (lambda folder: write_text(folder / "file" / "x", ""), "file: File exists"),
    "folder for file": (lambda folder: write_text(folder / "mine", ""), "mine: Is a directory"),
    "below a file": (lambda folder: (folder / "file" / "x").write_text(""), "Not a directory"),
    "full": (lambda _: Path("/dev/full").write_text("x"), "No space left on device. Remedy: make"),
    "full in Rust": (in_rust, "weights: No space left on device. Remedy: make room"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_disk_that_refuses_is_one_message(tmp_path, monkeypatch, capsys, trouble):
    if trouble == "right" and os.geteuid():
        pytest.skip("only root may become another user")
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "file").write_text("x")
    cause, message = TROUBLES[trouble]

    def main() -> None:
        cause(tmp_path)

    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def main() -> None:
        raise OSError("of no number")

    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(OSError, match="of no number"):
        run_command(main)
