"""A signal that asks a run to stop after the current step."""

import os
import signal
import threading
from typing import Any

from pipeline.distributed import rank, tell


class StopSignal:
    """SIGTERM, SIGUSR1 or SIGINT asks for a stop after the current step; a second SIGINT exits.

    A thread receives the signals, because Python's own handlers wait for the main thread, which may
    hang in a collective.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.former: dict[int, Any] = {}
        """Handlers to restore, by signal."""

    def __enter__(self) -> "StopSignal":
        # A rank of Ray Train runs in another thread, which gets no signals.
        if threading.current_thread() is not threading.main_thread():
            return self
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
            # Closing this end ends the thread.
            os.close(self.writer)

    def _receive(self, reader: int) -> None:
        while number := os.read(reader, 1):
            name = signal.Signals(number[0]).name
            if name == self.name == "SIGINT":
                tell(f"rank {rank()}: interrupted twice; leaving without saving")
                os._exit(128 + signal.SIGINT)
            self.name = name
            if rank() == 0:
                tell(f"{name}: this step is finished and saved; Ctrl-C again leaves at once")
