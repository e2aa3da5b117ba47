"""What a run shows: TensorBoard scalars, picture grids and hparams, and a line on the terminal."""

import resource
import time
from collections import Counter
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
from pipeline.batch import Batch
from pipeline.flops import ModelFlops, peak_flops
from pipeline.objective import Objective

NUM_LEVELS = 8  # of t, each 1/8 wide


class MonitorConfig(Config):
    every_steps: int = Field(default=50, gt=0)
    sample_every_steps: int = Field(default=1000, gt=0)
    prompts: list[str] = []  # drawn at the same noise each time, EMA weights
    heldout_samples: int = Field(default=64, ge=0)  # measured when pictures are drawn; 0: none
    mfu: bool = (
        True  # counts the model's FLOPs and, on a device no table knows, times it: seconds, once
    )
    block_norms: bool = True  # of gradient, update, weights, EMA distance; in logged steps only
    profile_steps: tuple[int, int] | None = None  # first and last to trace, for chrome://tracing
    log_samples: bool = False  # write down the samples of every step, in RUN/samples_seen/


class StepClock:
    """Where a step's time goes, part by part; on a GPU by events, read when a log waits for it anyway."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self.marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, part: str) -> None:
        """The time since the last mark was this part's."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def collect(self) -> Counter[str]:
        """Seconds by part since the last call, and start anew."""
        seconds: Counter[str] = Counter()
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        for (_, begin), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            seconds[part] += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
        self.reset()
        return seconds


class SampleLog:
    """RUN/samples_seen/rank_00000.txt: a line a sample, its step, place in the global batch and number."""

    def __init__(self, run: Path):
        folder = run / "samples_seen"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"rank_{distributed.rank():05d}.txt").open("a")

    def write(self, batch: Batch) -> None:
        places = zip(batch.indices.tolist(), batch.sample_ids.tolist(), strict=True)
        self.file.writelines(f"{batch.step} {index} {number}\n" for index, number in places)
        self.file.flush()


class LossMeter:
    """Sums of loss terms by noise level on the device: nothing waits for the GPU between logs."""

    def __init__(self, device: torch.device):
        self.names: tuple[str, ...] = ("loss",)
        self.sums = torch.zeros(NUM_LEVELS, 2, dtype=torch.float64, device=device)

    def add(self, t: Tensor, terms: dict[str, Tensor]) -> None:
        """Samples of one micro-batch, t and each term (b,); the terms are the same at every call."""
        if self.names != tuple(terms):
            self.names = tuple(terms)
            self.sums = self.sums.new_zeros(NUM_LEVELS, 1 + len(terms))
        level = (t * NUM_LEVELS).long().clamp_(max=NUM_LEVELS - 1)
        rows = torch.stack([torch.ones_like(t), *terms.values()], dim=1).double()
        self.sums.index_add_(0, level, rows)

    def collect(self) -> dict[str, float]:
        """Means over all ranks since the last call, and start anew. Collective."""
        if distributed.world_size() > 1:
            dist.all_reduce(self.sums)
        sums = self.sums.to("cpu", copy=True)
        self.sums.zero_()
        count = sums[:, 0].sum()
        values: dict[str, float] = {}
        for column, name in enumerate(self.names, 1):
            tag = "train" if name == "loss" else name
            values[f"loss/{tag}"] = float(sums[:, column].sum() / count)
            for level, row in enumerate(sums.tolist()):
                if row[0]:
                    middle = (level + 0.5) / NUM_LEVELS
                    values[f"{name}_by_noise_level/t_{middle:.4f}"] = row[column] / row[0]
        return values


class Monitor:
    """Rank 0's TensorBoard writer and progress; on other ranks only the collective parts do anything."""

    def __init__(
        self,
        run: Path,
        config: MonitorConfig,
        start_step: int,
        num_steps: int,
        global_batch: int,
        device: torch.device,
    ):
        self.run, self.config, self.device = run, config, device
        self.num_steps, self.global_batch = num_steps, global_batch
        self.images_before = 0  # more than the steps say, from when the global batch was another
        self.clock, self.times, self.profiler = StepClock(device), [], None
        self.shapes: Counter[tuple[int, int, int]] = (
            Counter()
        )  # of steps: latent h and w, text tokens
        self.flops: ModelFlops | None = None
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
        self.shapes.clear()
        self.times.clear()
        self.clock.reset()

    def mark(self, part: str) -> None:
        """What the step did since the last mark: data, forward, backward, optimizer or other."""
        self.clock.mark(part)

    def measure_flops(self, model_config: Any, precision: str) -> None:
        """From here on tokens and model FLOPs are counted; measures the device where no table knows it."""
        if self.writer is not None and self.config.mfu:
            self.flops = ModelFlops(model_config)
            self.patch = getattr(model_config, "patch_size", 1)
            self.peak, source = peak_flops(self.device, precision)
            self.writer.add_text("peak", f"{source}; times {distributed.world_size()} ranks", 0)

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

    def advance(self, step: int, t: Tensor, latent_size: tuple[int, int], text_length: int) -> None:
        """A step is done: its global t, its latents' height and width, its padded text on this rank."""
        self.times.append(t)
        self.shapes[*latent_size, text_length] += 1
        self._profile(step)
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def _profile(self, step: int) -> None:
        """Start after the step before the first to trace; write the trace after the last."""
        if self.config.profile_steps is None or not distributed.is_main():
            return
        first, last = self.config.profile_steps
        if self.profiler is None and first - 1 <= step < last:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler is not None and step == last:
            self.profiler.stop()
            path = self.run / "profile" / f"steps_{first}_{last}.json"
            path.parent.mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(str(path))
            self.profiler = None

    def _speed(self, elapsed: float, steps: int) -> dict[str, float]:
        """Rates of the interval. Image tokens alone are counted as tokens, padded text in the FLOPs."""
        parts, scale = self.clock.collect(), 1000 / steps
        values = {f"step_ms/{part}": seconds * scale for part, seconds in parts.items()}
        values |= {
            "speed/images_per_s": steps * self.global_batch / elapsed,
            "speed/step_ms": 1000 * elapsed / steps,
            "speed/data_wait_fraction": self.data_wait_s / elapsed,
            "memory/peak_gib": peak_memory(self.device) / 2**30,
        }
        if self.flops is not None:
            tokens = sum(n * h * w for (h, w, _), n in self.shapes.items()) / self.patch**2
            flops = sum(n * self.flops.picture(*shape) for shape, n in self.shapes.items())
            values["speed/tokens_per_s"] = self.global_batch * tokens / elapsed
            reachable = self.peak * distributed.world_size() * elapsed
            values["speed/mfu"] = self.global_batch * flops / reachable
        return values

    def log(self, step: int, values: dict[str, float], objective: Objective) -> None:
        """Scalars at `step` with rates since the last call, the histogram of log SNR, and one line."""
        elapsed = time.perf_counter() - self.since
        steps = step - self.since_step
        if self.writer is not None and self.progress is not None:
            values = values | self._speed(elapsed, steps)
            values["progress/images_seen"] = step * self.global_batch + self.images_before
            self.scalars(step, values)
            alpha, sigma = objective.alpha_sigma(torch.cat(self.times))
            log_snr = 2 * (alpha / sigma).log().clamp(-20, 20)
            self.writer.add_histogram("log_snr", log_snr, step)
            line = f"loss {values['loss/train']:.4f}  {values['speed/images_per_s']:.1f} images/s"
            self.progress.update(self.task, line=line)
            if not self.progress.console.is_terminal:
                remaining = (self.num_steps - step) * elapsed / steps
                print(f"step {step}/{self.num_steps}  {line}  {remaining:.0f} s left", flush=True)
        self.restart_clock(step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def pictures(self, step: int, name: str, grid: Tensor) -> None:
        """A picture uint8 (3, H, W)."""
        if self.writer is not None:
            self.writer.add_image(name, grid, step)

    def close(self) -> None:
        if self.writer is not None and self.progress is not None:
            self.progress.stop()
            self.writer.close()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on the GPU so far, or the most resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
