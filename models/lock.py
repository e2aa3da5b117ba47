"""One writer for a folder: a file that names the process that writes there, and that its heartbeat keeps moving."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.config import InputError
from models.files import write_whole

BEAT_S = 15.0
# Heartbeats that a process may miss before another one takes its place.
MISSED = 3
# What stays the same when a launcher starts a job again.
JOBS = ("FLOWMILL_JOB", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "SKYPILOT_TASK_ID", "PBS_JOBID")

Owner = dict[str, Any]
"""What the file says of a process; empty where there is no file, or nothing in it yet."""


class Lock:
    """A context in which no other process writes to the folder of `path`; entering it may raise InputError.

    A process is succeeded at once where it was of the same job or is known to have ended. Any other is
    watched first, and succeeded unless its heartbeat moves: a job that a launcher starts again, on
    another host perhaps, has to go on without a person.
    """

    def __init__(self, path: Any, what: str, say: Callable[[str], object]):
        """`path` is on a disk, or on a store for a subclass; `what` is the option that named the folder."""
        self._path, self._what, self._say = path, what, say
        self._where = f"{what}: {path.parent}"
        self._own: Owner = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "space": _process_space(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            # Without an id of its own a run of torchrun is called "none".
            "job": {n: os.environ[n] for n in JOBS if os.environ.get(n, "none") != "none"},
            "beat": 0,
        }
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __getstate__(self) -> dict[str, Any]:
        """What `check` needs, in another process."""
        return {n: v for n, v in vars(self).items() if n not in ("_say", "_over", "_thread")}

    def __enter__(self) -> "Lock":
        try:
            self._take()
        except OSError as error:
            why = error.strerror or error
            raise InputError(
                f"{self._what}: cannot write {self._path.parent}: {why}. Remedy: the right to write there, or another place"
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            if self._read().get("token") == self._own["token"]:
                self._path.unlink()

    @property
    def lost(self) -> bool:
        """Whether a heartbeat has found another process in this one's place."""
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise InputError where another process has taken the place, whose files must be left alone."""
        owner = self._read()
        if owner and owner["token"] != self._own["token"]:
            raise InputError(
                f"{self._where}: taken over by {_name(owner)}; stopped without writing. Remedy: let that one "
                "go on, or end it and run this again."
            )

    def _take(self) -> None:
        seen, waited_s, look_s = None, 0.0, min(1.0, BEAT_S / 5)
        while True:
            owner = self._read()
            if not owner and self.create(json.dumps(self._own)):
                return
            if waited_s >= MISSED * BEAT_S or self._succeeds(owner):
                self._say(f"{self._where}: goes on in the place of {_name(owner)}")
                self.write(json.dumps(self._own))
                # Of several that do so at once the last one stays.
                time.sleep(look_s)
                if self._read().get("token") == self._own["token"]:
                    return
                seen, waited_s = None, 0.0
            elif seen is None:
                seen = owner
                self._say(
                    f"{self._where}: may still be written to by {_name(owner)}; looking for its heartbeat "
                    f"for {MISSED * BEAT_S:.0f} s"
                )
            elif owner and owner != seen:
                raise InputError(
                    f"{self._where}: {_name(owner)} is writing there. Remedy: wait for it, or end it."
                )
            # Looks are counted, since this process itself may be suspended for a while.
            time.sleep(look_s)
            waited_s += look_s

    def _succeeds(self, owner: Owner) -> bool:
        """Whether this process may take the other's place without watching it."""
        if owner.get("job", {}).items() & self._own["job"].items():
            return True
        seen_from_here = all(owner.get(name) == self._own[name] != "" for name in ("host", "space"))
        return seen_from_here and _started(owner["pid"]) != owner["started"]

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            # What fails now is tried again at the next heartbeat.
            with suppress(OSError):
                if self._read().get("token", self._own["token"]) != self._own["token"]:
                    return
                self._own["beat"] += 1
                self.write(json.dumps(self._own))

    def _read(self) -> Owner:
        try:
            text = self.read()
        except FileNotFoundError:
            return {}
        with suppress(ValueError):
            owner = json.loads(text)
            if isinstance(owner, dict) and owner.keys() >= self._own.keys():
                return owner
        return {"token": text} if text else {}

    # What differs on a store.

    def read(self) -> str:
        return self._path.read_text()

    def create(self, text: str) -> bool:
        """Whether the file is now there with this text, and was not there before."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def write(self, text: str) -> None:
        write_whole(self._path, lambda path: path.write_text(text), durable=False)


def _name(owner: Owner) -> str:
    if "pid" not in owner:
        return "an unknown process"
    more = "".join(f", {key} {value}" for key, value in owner["job"].items())
    return f"process {owner['pid']} on {owner['host']}{more}"


def _process_space() -> str:
    """What a process id is unique within, besides the host's name; "" where that is not known."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" where none has that id, or one that has ended."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""
