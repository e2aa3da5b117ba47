"""What a run shows: TensorBoard scalars, picture grids and hparams, and a line on the terminal."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models.config import Config
from pipeline import distributed

NUM_LEVELS = 8  # of t, each 1/8 wide


class MonitorConfig(Config):
    every_steps: int = Field(default=50, gt=0)
    sample_every_steps: int = Field(default=1000, gt=0)
    prompts: list[str] = []  # drawn at the same noise each time, EMA weights


class LossMeter:
    """Sums of loss and x0 error by noise level on the device: nothing waits for the GPU between logs."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(NUM_LEVELS, 3, dtype=torch.float64, device=device)

    def add(self, t: Tensor, loss: Tensor, x0_mse: Tensor) -> None:
        """Samples of one micro-batch, each (b,)."""
        level = (t * NUM_LEVELS).long().clamp_(max=NUM_LEVELS - 1)
        rows = torch.stack([torch.ones_like(loss), loss.detach(), x0_mse], dim=1).double()
        self.sums.index_add_(0, level, rows)

    def collect(self) -> dict[str, float]:
        """Means over all ranks since the last call, and start anew. Collective."""
        if distributed.world_size() > 1:
            dist.all_reduce(self.sums)
        sums = self.sums.to("cpu", copy=True)
        self.sums.zero_()
        count = sums[:, 0].sum()
        values = {
            "loss/train": float(sums[:, 1].sum() / count),
            "loss/x0_mse": float(sums[:, 2].sum() / count),
        }
        for level, (number, loss, x0_mse) in enumerate(sums.tolist()):
            if number:
                name = f"t_{(level + 0.5) / NUM_LEVELS:.4f}"
                values[f"loss_by_noise_level/{name}"] = loss / number
                values[f"x0_mse_by_noise_level/{name}"] = x0_mse / number
        return values


class Monitor:
    """Rank 0's TensorBoard writer and progress; on other ranks only the collective parts do anything."""

    def __init__(self, run: Path, start_step: int, num_steps: int, global_batch: int):
        self.num_steps, self.global_batch = num_steps, global_batch
        self.writer = self.progress = None
        if distributed.is_main():
            # Points beyond the step we resume from were written by a run that went on and was lost.
            self.writer = SummaryWriter(
                str(run / "tensorboard"), purge_step=start_step + 1 if start_step else None
            )
            self.progress = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.task = self.progress.add_task(
                "train", total=num_steps, completed=start_step, line=""
            )
            if self.progress.console.is_terminal:
                self.progress.start()
        self.restart_clock(start_step)

    def restart_clock(self, step: int) -> None:
        """Rates count from here: saving and drawing pictures are not training."""
        self.since, self.since_step, self.data_wait_s = time.perf_counter(), step, 0.0

    def describe(self, config_yaml: str, hparams: dict[str, Any], num_parameters: int) -> None:
        """The config as text, and hparams in the run's own writer."""
        if self.writer is None:
            return
        self.writer.add_text("config", f"```yaml\n{config_yaml}\n```", 0)
        self.writer.add_text("model", f"{num_parameters:,} parameters", 0)
        from torch.utils.tensorboard.summary import hparams as summarise

        plain = {
            k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()
        }
        for part in summarise(plain, {"loss/train": 0.0}):
            assert self.writer.file_writer is not None
            self.writer.file_writer.add_summary(part)

    def advance(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars at `step` with rates since the last call, and one line."""
        elapsed = time.perf_counter() - self.since
        steps = step - self.since_step
        values = values | {
            "speed/images_per_s": steps * self.global_batch / elapsed,
            "speed/step_ms": 1000 * elapsed / steps,
            "speed/data_wait_fraction": self.data_wait_s / elapsed,
            "progress/images_seen": step * self.global_batch,
        }
        if self.writer is not None and self.progress is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            line = f"loss {values['loss/train']:.4f}  {values['speed/images_per_s']:.1f} images/s"
            self.progress.update(self.task, line=line)
            if not self.progress.console.is_terminal:
                remaining = (self.num_steps - step) * elapsed / steps
                print(f"step {step}/{self.num_steps}  {line}  {remaining:.0f} s left", flush=True)
        self.restart_clock(step)

    def pictures(self, step: int, name: str, grid: Tensor) -> None:
        """A picture uint8 (3, H, W)."""
        if self.writer is not None:
            self.writer.add_image(name, grid, step)

    def close(self) -> None:
        if self.writer is not None and self.progress is not None:
            self.progress.stop()
            self.writer.close()
