"""A run's file for TensorBoard, and how its pages are laid out."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline import distributed

GLANCE = {
    "loss/train": "loss",
    "heldout_ema/x0_mse": "heldout_x0_mse",
    "speed/images_per_s": "images_per_s",
}
"""What the first screen shows beside the pictures. TensorBoard sorts its groups by name."""

LAYOUT = {
    "Learning": {
        "loss": ["Multiline", [r"loss/.*"]],
        "held-out error of x0": ["Multiline", [r"heldout_(ema|raw)/x0_mse"]],
        "held-out loss": ["Multiline", [r"heldout_(ema|raw)/loss"]],
        "held-out error by noise level": ["Multiline", [r"heldout_ema/x0_mse_t_.*"]],
        "loss by noise level": ["Multiline", [r"loss_by_noise_level/loss_t_.*"]],
        "norms": ["Multiline", [r"norm/.*", r"optimizer/grad_norm"]],
    },
    "Speed": {
        "images per second": ["Multiline", [r"speed/images_per_s"]],
        "milliseconds of a step by part": ["Multiline", [r"step_ms/.*"]],
        "shares": ["Multiline", [r"speed/(mfu|goodput|data_wait_fraction)"]],
    },
}
"""The page `Custom Scalars`: curves that belong together, by patterns of their tags."""


class Board:
    """Summaries to show, kept on rank 0 until `flush` writes them; what the disk refuses waits on.

    TensorBoard's own writer has a thread that ends for good, with a traceback, at the first refusal.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        """`purge_step`: the points of earlier files from this step on are void."""
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.path, self.waiting = folder / name, list[bytes]()
        self._keep(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._keep(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _keep(self, event: Event) -> None:
        event.wall_time = time.time()
        if distributed.is_main():
            self.waiting.append(event.SerializeToString())

    def add(self, summary: Any, step: int = 0) -> None:
        """Show what a function of torch.utils.tensorboard.summary made."""
        self._keep(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Write what waits; leaves the file as it was, and says so once, where the disk refuses."""
        if not self.waiting:
            return
        with distributed.beside("TensorBoard"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.stat().st_size if self.path.is_file() else 0
            try:
                with self.path.open("ab") as file:
                    for event in self.waiting:
                        RecordWriter(file).write(event)
                self.waiting.clear()
            except OSError:
                # Half a record would hide all that follows it.
                with suppress(OSError):
                    os.truncate(self.path, before)
                raise
