"""A watchdog: one dead, stopped or stuck rank ends all, which report its name and where it was.

Every rank sends heartbeats to the rendezvous store and checks those of the next rank. A heartbeat
carries the main thread's stack, to tell where a rank was that no longer answers. What one rank finds,
the others read at their next heartbeat. Time is counted in heartbeats, so a run that was suspended as
a whole goes on.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback

import torch.distributed as dist

from models.config import InputError
from pipeline import distributed

DEPTH = 12
"""Calls of a stack that are shown."""


class Watchdog:
    """A context around the training loop, which reports its progress by `alive(step)`."""

    def __init__(self, silence_s: float, stuck_s: float):
        """No heartbeat for silence_s: the rank is dead or stopped. No step for stuck_s: stuck."""
        self.silence_s, self.stuck_s, self.beat_s = silence_s, stuck_s, min(silence_s / 5, 2.0)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.name = f"rank {self.rank} (pid {os.getpid()} on {socket.gethostname()})"
        self.main = threading.get_ident()
        self.step, self.idle_s, self.unanswered_s, self.silent_s = 0, 0.0, 0.0, 0.0
        self.heard, self.over = "", threading.Event()
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        if self.world_size > 1:
            # It has its own connection; a thread that does not use it watches the one that does.
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False)
            self.store = dist.PrefixStore("watchdog", store)
            for target in (self._beat, self._watch):
                self.threads.append(threading.Thread(target=target, name="watchdog", daemon=True))
                self.threads[-1].start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        # An InputError needs no report: all ranks raise the same one.
        fails = isinstance(error, Exception) and not isinstance(error, InputError)
        if self.world_size > 1 and error is not None and fails:
            text = "".join(traceback.format_exception(error))
            silent = self._silent_ranks() if isinstance(error, RuntimeError) else ""
            # Or the heartbeats' thread would take this verdict for another rank's, and exit.
            self.over.set()
            self._tell(f"{self.name} failed at step {self.step}:\n{text}{silent}")
            if silent:
                distributed.tell(silent)
            self._linger()
        self.over.set()
        # A thread inside a call of the store would abort the interpreter's exit.
        for thread in self.threads:
            thread.join(self.silence_s)

    def alive(self, step: int) -> None:
        self.step, self.idle_s = step, 0.0

    def _beat(self) -> None:
        number = 0
        try:
            while not self.over.is_set():
                number += 1
                frame = sys._current_frames()[self.main]
                stack = "".join(traceback.format_stack(frame, DEPTH))
                beat = f"{self.name}, heartbeat {number}, at step {self.step}, last in:\n{stack}"
                self.store.set(f"beat/{self.rank}", beat)
                self._listen()
                self.unanswered_s = 0.0
                self.over.wait(self.beat_s)
        except dist.DistError as error:
            if not self.over.is_set():
                self._leave(f"the rendezvous store, at rank 0 or its launcher, is gone: {error}")

    def _listen(self) -> None:
        if self.store.check(["verdict"]):
            self._leave(self.store.get("verdict").decode())
        heard = self._heard((self.rank + 1) % self.world_size)
        self.silent_s = 0.0 if heard != self.heard else self.silent_s + self.beat_s
        self.heard = heard
        if self.silent_s > self.silence_s:
            self._leave(self._tell(f"no answer for {self.silent_s:.0f} s from {heard}"))

    def _heard(self, rank: int) -> str:
        """A rank's heartbeat: who it is and at which step, and its main thread's stack."""
        key = f"beat/{rank}"
        if self.store.check([key]):
            return self.store.get(key).decode()
        return f"rank {rank}, never heard\n"

    def _watch(self) -> None:
        report: threading.Thread | None = None
        while not self.over.wait(1.0):
            self.idle_s, self.unanswered_s = self.idle_s + 1, self.unanswered_s + 1
            if self.unanswered_s > self.silence_s + self.beat_s:
                self._leave("the rendezvous store does not answer: rank 0 or its launcher hangs")
            if self.idle_s > self.stuck_s and report is None:
                # In a thread, because the store blocks its caller while the network is down.
                report = threading.Thread(target=self._report, name="watchdog", daemon=True)
                report.start()

    def _report(self) -> None:
        """Exit and say where the ranks are."""
        groups: dict[str, list[str]] = {}
        for heard in map(self._heard, range(self.world_size)):
            groups.setdefault(heard.partition("\n")[2], []).append(heard)
        # Ranks that wait for another one all wait in the same place; that one is elsewhere.
        odd = sorted(groups.values(), key=len)
        shown = "\n".join(f"{first}and {len(rest)} more ranks there" for first, *rest in odd)
        self._leave(self._tell(f"no step in {self.stuck_s:.0f} s. The ranks are at:\n{shown}"))

    def _silent_ranks(self) -> str:
        """The ranks after this one that miss two heartbeats: a collective fails as soon as another rank dies.

        All ranks ask the store at once, so that each asks for a few.
        """
        near = [(self.rank + n) % self.world_size for n in range(1, min(32, self.world_size))]
        before = {rank: self._heard(rank) for rank in near}
        self.over.wait(2.5 * self.beat_s)
        silent = [heard for rank, heard in before.items() if heard == self._heard(rank)]
        return "".join(f"no answer from {heard}" for heard in silent)

    def _tell(self, verdict: str) -> str:
        """Tell all ranks; the first rank's verdict counts, and is returned."""
        return self.store.compare_set("verdict", "", verdict).decode()

    def _linger(self) -> None:
        """Let the others read the verdict before rank 0, which may hold the store, exits."""
        if self.rank == 0:
            time.sleep(2.5 * self.beat_s)

    def _leave(self, verdict: str) -> None:
        self.over.set()
        distributed.tell(f"\nrank {self.rank} stops at step {self.step}: {verdict}")
        faulthandler.dump_traceback()
        self._linger()
        os._exit(1)
