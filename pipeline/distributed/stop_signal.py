"""A signal that asks a run to stop after the step in hand."""

import os
import signal
import sys
import threading
from typing import Any

from pipeline.distributed import rank


class StopSignal:
    """SIGTERM, SIGUSR1 or SIGINT to any rank asks for a stop after the step in hand; a second SIGINT leaves now.

    A thread receives the signals: Python's own handlers wait for the main thread, which may hang in a
    collective.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.former: dict[int, Any] = {}  # handlers

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # a rank of Ray Train's, which has no signals: its job is stopped at a checkpoint
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self.former[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._receive, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        if self.former:
            signal.set_wakeup_fd(-1)
            os.close(self.writer)  # which ends the thread

    def _receive(self, reader: int) -> None:
        while number := os.read(reader, 1):  # nothing once the other end is closed
            name = signal.Signals(number[0]).name
            if name == self.name == "SIGINT":
                sys.stderr.write(f"rank {rank()}: interrupted twice; leaving without saving\n")
                os._exit(128 + signal.SIGINT)
            self.name = name
