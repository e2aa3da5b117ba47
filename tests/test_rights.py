"""Files for others: modes follow the umask, a missing right is one message, another user works with what we wrote."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from models.command import run_command
from models.files import naming, write_text
from tests import train_factory
from tests.others import NOBODY, another_user
from tests.prep_factory import config_of_pictures
from tests.train_factory import ROOT

WRITE = """
import os, sys
os.umask(int(sys.argv[2]))
from pathlib import Path
import torch
from safetensors.torch import save_file
from models.files import publish, write_whole
folder = Path(sys.argv[1])
folder.mkdir()
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


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_what_safetensors_writes_follows_the_umask_and_what_is_not_ours_stays(tmp_path, umask):
    folder = tmp_path / "all"
    done = train_factory.run("-c", WRITE, str(folder), str(umask))
    assert done.returncode == 0, done.stderr
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


def without_rights_in_rust(folder: Path) -> None:
    os.seteuid(NOBODY)
    load_file(folder / "weights")


def in_rust(folder: Path) -> None:
    with naming(folder / "weights"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


TROUBLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "right": (without_rights, "mine: Permission denied. Remedy: the right"),
    "right in Rust": (without_rights_in_rust, "weights: Permission denied. Remedy: the right"),
    "file for folder": (lambda folder: write_text(folder / "file" / "x", ""), "file: File exists"),
    "folder for file": (lambda folder: write_text(folder / "mine", ""), "mine: Is a directory"),
    "below a file": (lambda folder: (folder / "file" / "x").write_text(""), "Not a directory"),
    "below a file in Rust": (lambda folder: load_file(folder / "file" / "x"), "Not a directory"),
    "full": (lambda _: Path("/dev/full").write_text("x"), "No space left on device. Remedy: make"),
    "full in Rust": (in_rust, "weights: No space left on device. Remedy: make room"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_disk_that_refuses_is_one_message(tmp_path, monkeypatch, capsys, trouble):
    if "right" in trouble and os.geteuid():
        pytest.skip("only root may become another user")
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "file").write_text("x")
    (tmp_path / "weights").write_text("x")
    cause, message = TROUBLES[trouble]

    def main() -> None:
        cause(tmp_path)

    monkeypatch.setattr(sys, "argv", ["main"])
    try:
        with pytest.raises(SystemExit) as ended:
            run_command(main)
    finally:
        os.seteuid(os.getuid())
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


TRAIN = """
data: {{path: {folder}/dataset}}
model: {{size: debug}}
training: {{images: {images}, global_batch: 8}}
engine: {{precision: fp32, cpu_threads: 1}}
run: {run}
checkpoint: {{every_steps: 2, keep: 2}}
monitor: {{every_steps: 2, sample_every_steps: 2, prompts: [one], mfu: false}}
sampler: {{num_steps: 2}}
"""


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that everyone may enter, unlike pytest's, with encoders and a config of pictures."""
    from tests.test_text_encoder import save_encoder
    from tests.test_vae import save_kl

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        encoders = save_kl(place / "vae"), save_encoder(place / "text", "bert")
        config_of_pictures(place, 24, *encoders, heldout_fraction=0.25)
        for path in place.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield place


def as_root(umask: int, module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], umask=umask, cwd=ROOT,
        env=train_factory.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_another_user_works_with_what_we_wrote_or_is_told_in_one_message(open_folder, umask):
    dataset, run, home = (open_folder / name for name in ("dataset", "run", "home"))
    for path in (dataset, run, home):
        shutil.rmtree(path, ignore_errors=True)
    ours, theirs = open_folder / "ours.yaml", open_folder / "theirs.yaml"
    ours.write_text(TRAIN.format(folder=open_folder, run=run, images=32))
    theirs.write_text(TRAIN.format(folder=open_folder, run=home / "run", images=32))
    with another_user(home, umask) as user:
        as_root(umask, "data_prep.prepare", str(open_folder / "c.yaml"))
        as_root(umask, "pipeline.train", str(ours))
        assert strange_modes(dataset, umask) + strange_modes(run, umask) == []
        results = {
            "verify": user("data_prep.verify", str(dataset)),
            "train on": user("pipeline.train", str(theirs)),
            "sample": user("pipeline.sample", str(run), "--prompt", "x", "--output", f"{home}/drawn"),
            "export": user("pipeline.export", str(run), f"{home}/exported"),
            "start from": user("pipeline.train", str(theirs), f"run={home}/two", f"start_from.run={run}"),
            "evaluate": user("pipeline.evaluate", str(run), "--output", f"{home}/results"),
            "sample there": user("pipeline.sample", str(run), "--prompt", "x"),
            "resume": user("pipeline.train", str(ours), "training.images=64"),
            "prepare again": user("data_prep.prepare", str(open_folder / "c.yaml"), "--restart"),
        }  # fmt: skip
        works = list(results)[:6] if umask == 0o022 else []
        for name, done in results.items():
            print(name, done.returncode, done.stderr[-300:])
        for name, done in results.items():
            assert "Traceback" not in done.stderr, f"{name}: {done.stderr}"
            assert done.returncode == (0 if name in works else 2), f"{name}: {done.stderr}"
            assert name in works or str(open_folder) in done.stderr
        if works:
            assert (
                strange_modes(home / "exported", umask) + strange_modes(home / "run", umask) == []
            )
