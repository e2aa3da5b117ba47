"""Commands in processes forked from one that has imported torch, DeepSpeed and Ray: a start takes half a second,
not five. That one has imported nothing of ours, so each command reads our code as `python -m` does."""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import psutil

IMPORTED = [
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.engine",
    "diffusers.models.autoencoders",
    "pyarrow.parquet",
    "ray.runtime_env",
    "transformers.modeling_utils",
    "typer.rich_utils",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], timeout_s: float, what: str = "") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def _become(words: list[str], environment: dict[str, str], cwd: Path, folder: str) -> None:
    """What `python -m` or `python -c` does in a process of its own; its output goes to files of `folder`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    # Streams of their own: those inherited remember whether what they were opened on could seek.
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", encoding="utf-8", errors=errors, buffering=1, closefd=False)
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    code = words.pop(1) if words[0] == "-c" else None
    sys.argv = words
    try:
        if code is not None:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing's children leave out


def _of_ranks(environment: dict[str, str], ranks: int) -> list[dict[str, str]]:
    """The environment of each rank, as a launcher on one host sets it."""
    if ranks == 1:
        return [environment]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    group |= {"LOCAL_WORLD_SIZE": str(ranks)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [environment | group | place for place in places]


def run_forked(
    words: list[str], environment: dict[str, str], cwd: Path, ranks: int = 1, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """A module or -c CODE with its arguments, to the end; of several ranks where one fails all are ended."""
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for own in _of_ranks(environment, ranks):
            processes.append(SERVER.Process(target=_become, args=(words, own, cwd, folder)))
            processes[-1].start()
        running = {process.sentinel: process for process in processes}
        while running:
            ended = wait(running, timeout=max(0, deadline - time.monotonic()))
            failed = not ended
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                failed |= process.exitcode != 0
            for process in running.values() if failed else ():
                process.terminate() if ended else process.kill()
        texts = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    codes = [process.exitcode or 0 for process in processes]
    if time.monotonic() > deadline:
        raise subprocess.TimeoutExpired(words, timeout_s, *texts)
    return subprocess.CompletedProcess(words, codes[0] if ranks == 1 else int(any(codes)), *texts)


class Forked:
    """A module or -c CODE, running on one rank or several, with what tests use of a subprocess.Popen of rank 0."""

    def __init__(
        self, words: list[str], environment: dict[str, str], cwd: Path, merged: bool, ranks: int = 1
    ):
        """merged: one stream for standard output and error."""
        self._folder = tempfile.TemporaryDirectory()
        out, err = (Path(self._folder.name) / name for name in ("stdout", "stderr"))
        os.mkfifo(out)
        err.symlink_to(out) if merged else os.mkfifo(err)
        place = self._folder.name
        every = [
            SERVER.Process(target=_become, args=(words, own, cwd, place))
            for own in _of_ranks(environment, ranks)
        ]
        for process in every:
            process.start()
        self._process, self.ranks = every[0], [process.pid or 0 for process in every]
        self.pid = self.ranks[0]
        self.stdout, self.stderr = out.open(), None if merged else err.open()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read() if self.stderr else ""

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
