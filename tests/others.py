"""Another user of this machine, and a disk of its own that is too small: for tests that root runs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

from tests.train_factory import ROOT, environment

NOBODY = 65534
# Folders in which another user must find Python and the code, wherever they lie.
NEEDED = [Path(sys.base_prefix).resolve(), Path(sys.prefix), Path(sys.prefix).resolve(), ROOT]


def namespace_or_skip() -> None:
    if os.geteuid():
        pytest.skip("only root may become another user, or mount a disk")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")


def uncovered() -> str:
    """Shell lines that make what is needed readable in this mount namespace, where a parent is private to root."""
    lines, covers = ["set -e", "hold=$(mktemp -d)"], dict[Path, None]()
    for number, path in enumerate(NEEDED):
        private = [p for p in reversed(path.parents) if not p.stat().st_mode & 0o001]
        if private:
            covers[private[0]] = None
            lines += [f"mkdir $hold/{number}; mount --rbind '{path}' $hold/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 none '{cover}'" for cover in covers]
    for number, path in enumerate(NEEDED):
        if any(path.is_relative_to(cover) for cover in covers):
            lines += [f"mkdir -p '{path}'; mount --rbind $hold/{number} '{path}'"]
    return "\n".join(lines)


User = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def another_user(home: Path, umask: int) -> Iterator[User]:
    """Runs modules as another user with a home and a umask of its own."""
    namespace_or_skip()
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        command = [*become, sys.executable, "-m", module, *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(home), "TMPDIR": str(home)}
        script = f'{uncovered()}\ncd "{home}"\numask {umask:03o}\nexec "$@"'
        return subprocess.run(
            ["unshare", "-m", "bash", "-c", script, "bash", *command],
            capture_output=True, text=True, env=environment, timeout=600,
        )  # fmt: skip

    yield run


class SmallDisk:
    """A disk of so many bytes, mounted in a namespace of its own at a folder that is empty outside it."""

    def __init__(self, folder: Path, size: int):
        namespace_or_skip()
        self.folder = folder
        folder.mkdir(exist_ok=True)
        mount = (
            f"mount -t tmpfs -o size={size} none '{folder}' && echo mounted && exec sleep infinity"
        )
        self.holder = subprocess.Popen(
            ["unshare", "-m", "bash", "-c", mount], stdout=subprocess.PIPE, text=True
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "mounted\n"
        self.seen = Path(f"/proc/{self.holder.pid}/root{folder}")
        """The folder as it is on the disk."""

    def used(self) -> int:
        disk = os.statvfs(self.seen)
        return (disk.f_blocks - disk.f_bfree) * disk.f_frsize

    def leave(self, room: int) -> None:
        """Fill the disk up to so many bytes."""
        disk = os.statvfs(self.seen)
        (self.seen / "filler").write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - room)))

    def make_room(self) -> None:
        (self.seen / "filler").unlink()

    def run(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            ["nsenter", "-m", "-t", str(self.holder.pid), "env", f"--chdir={ROOT}", *command],
            env=environment(), capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.kill()
        self.holder.wait()
