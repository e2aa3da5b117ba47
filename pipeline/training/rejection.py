"""Rejection of harmful steps: a loss or gradient not finite, a loss far above the others.

A rejected step changes no parameter, moment or average on any rank, and the schedule does not
advance. It is counted, and its samples are written to RUN/rejected.jsonl; too many in a row end the
run.
"""

import json
import math
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.files import write_text
from pipeline import distributed
from pipeline.config import TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.training.ema import WithEMA
from pipeline.training.forward import Terms


class Rejection:
    """Judges every step, with the same verdict on all ranks."""

    def __init__(self, config: TrainConfig, loader: Loader, optimizer: WithEMA):
        self.config, self.path = config.rejection, Path(config.run) / "rejected.jsonl"
        self.loader, self.optimizer, self.taken = loader, optimizer, optimizer.num_taken
        self.total, self.in_a_row = 0, 0
        self.recent: deque[float] = deque(maxlen=self.config.window)

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row, "recent": list(self.recent)}

    def load(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
        self.recent.extend(state["recent"])
        if distributed.is_main() and self.path.is_file():
            # Those that come after are of steps that are lost.
            kept = self.path.read_text().splitlines(keepends=True)[: self.total]
            with distributed.beside(self.path.name):
                write_text(self.path, "".join(kept))

    def judge(self, terms: list[Terms]) -> Tensor:
        """The total for the last backward, NaN where the global batch's mean loss is to be rejected. Collective."""
        # The step is then skipped by its gradient's norm, the one figure that a step waits for anyway.
        loss = losses_of(terms).mean().double()
        if distributed.world_size() > 1:
            dist.all_reduce(loss)
        loss /= distributed.world_size()
        self.limit = math.inf
        if self.config.spike_factor and len(self.recent) == self.config.window:
            self.limit = self.config.spike_factor * sum(self.recent) / self.config.window
        # On a GPU it is there when the norm is; a copy to memory that is not page-locked would wait at once.
        self.loss = torch.empty((), dtype=loss.dtype, pin_memory=loss.is_cuda)
        self.loss.copy_(loss, non_blocking=True)
        fine = loss.isfinite() & (loss <= self.limit)
        return terms[-1].total * torch.where(fine, 1.0, torch.nan)

    def settle(self, step: int, batch: Batch, terms: list[Terms]) -> bool:
        """Whether the optimizer's step was taken. Collective.

        Exits with status 1 after too many rejected steps in a row.
        """
        loss, reason = float(self.loss.numpy()), "gradient not finite"
        if self.optimizer.num_taken > self.taken:
            self.taken, self.in_a_row = self.optimizer.num_taken, 0
            self.recent.append(loss)
            return True
        if not math.isfinite(loss):
            reason = f"loss {loss}"
        elif loss > self.limit:
            reason = f"loss {loss:.4g} is above {self.limit:.4g}"
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        self._note(step, reason, batch, losses_of(terms))
        if self.in_a_row == self.config.max_in_a_row:
            message = (
                f"{self.in_a_row} steps in a row were rejected, the last of them step {step}: {reason}. Their "
                f"samples are in {self.path}; the last checkpoint is as it was."
            )
            sys.exit(message if distributed.is_main() else 1)
        return False

    def _note(self, step: int, reason: str, batch: Batch, losses: Tensor) -> None:
        """Write down the samples whose loss (b,) is not finite, or else all of them. Collective."""
        mixture = self.loader.era_at(batch.step).mixture
        bad = ~torch.isfinite(losses)
        if not any(distributed.gather_objects(bool(bad.any()))):
            bad[:] = True
        rows = [
            {"index": int(batch.indices[i]), "loss": str(float(losses[i]))}
            | mixture.locate(int(batch.sample_ids[i]))
            for i in bad.nonzero().flatten().tolist()
        ]
        everyone = distributed.gather_objects(rows)
        if distributed.is_main():
            samples = sorted((r for part in everyone for r in part), key=lambda r: r["index"])
            line = {"step": step, "reason": reason, "samples": samples}
            # What is there before the first is left over from an attempt of which nothing was kept.
            mode = "a" if self.total > 1 else "w"
            with distributed.beside(self.path.name), self.path.open(mode) as file:
                file.write(json.dumps(line) + "\n")
        distributed.say(f"step {step} rejected: {reason}; {self.total} in all")


def losses_of(terms: list[Terms]) -> Tensor:
    """Loss of each of this rank's samples, (b,)."""
    return torch.cat([part.named["loss"] for part in terms])
