"""Where a run's hours went, over all its attempts: RUN/ledger.json, whose parts add up to the wall time."""

import json
import time
from pathlib import Path
from typing import Any

import psutil

from models.files import write_text
from pipeline import distributed

LEDGER = "ledger.json"
PARTS = ("productive", "data_wait", "save", "look", "replayed", "start_up")
"""Seconds of an attempt by part. What lies between two attempts, and what one spent after it last wrote, is `lost`."""


class Ledger:
    """Counts this attempt's seconds on rank 0, and knows those of the attempts before."""

    def __init__(self, folder: Path):
        self.path = folder / LEDGER
        self.before: list[dict[str, Any]] = []
        if self.path.is_file():
            self.before = json.loads(self.path.read_text())["attempts"]
        # Steps up to this one were taken before: a killed attempt learned from them in vain.
        self.reached = max((attempt["step"] for attempt in self.before), default=0)
        self.began = psutil.Process().create_time()
        self.now, self.step, self.waited = self.began, 0, 0.0
        self.spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.steps = "start_up"
        """The part that steps belong to now, with their logs."""

    def mark(self, part: str) -> None:
        """Count what came since the last mark as `part`."""
        now = time.time()
        self.spent[part] += now - self.now
        self.now = now

    def stepped(self, step: int, waited_s: float) -> None:
        """Count a step, of which the loader's total of `waited_s` tells how much was waiting for data."""
        waited, self.waited = waited_s - self.waited, waited_s
        self.steps = "replayed" if step <= self.reached else "productive"
        self.mark(self.steps)
        self.spent[self.steps] -= waited
        self.spent["data_wait"] += waited
        self.step = step

    def totals(self) -> dict[str, float]:
        """Seconds by part over all attempts, `lost` among them; their sum is the wall time so far."""
        attempts = [*self.before, self._attempt()]
        sums: dict[str, float] = {part: sum(a[part] for a in attempts) for part in PARTS}
        wall = self.now - attempts[0]["began"]
        return sums | {"lost": wall - sum(sums.values())}

    def goodput(self) -> float:
        """Productive share of the wall time since the first attempt began."""
        totals = self.totals()
        return totals["productive"] / max(sum(totals.values()), 1e-9)

    def write(self) -> None:
        """Keep this attempt's seconds so far. Rank 0 alone writes."""
        attempts = [*self.before, self._attempt()]
        with distributed.beside("the ledger"):
            if distributed.is_main():
                write_text(self.path, json.dumps({"attempts": attempts}, indent=1))

    def line(self) -> str:
        """How the time was spent, for people."""
        totals = self.totals()
        wall = max(sum(totals.values()), 1e-9)
        parts = ", ".join(
            f"{part.replace('_', ' ')} {seconds / wall:.1%}"
            for part, seconds in sorted(totals.items(), key=lambda item: -item[1])
            if seconds >= wall / 2000
        )
        count = len(self.before) + 1
        return f"{wall / 3600:.2f} h in {count} attempt{'s' * (count > 1)}: {parts}"

    def _attempt(self) -> dict[str, Any]:
        return {"began": self.began, "step": self.step, **self.spent}
