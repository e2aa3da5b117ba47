"""What a run shows: TensorBoard scalars, picture grids and hparams, and a line on the terminal."""

import itertools
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, histogram, hparams, image, scalar, text

from models.config import flatten
from models.files import append_to
from pipeline import distributed
from pipeline.config import TrainConfig, dump_config
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.distributed import Exchange
from pipeline.objectives.objective import Objective
from pipeline.training.board import GLANCE, LAYOUT, Board
from pipeline.training.clock import Clock
from pipeline.training.ema import WithEMA
from pipeline.training.engine import grad_norm
from pipeline.training.flops import ModelFlops, peak_flops
from pipeline.training.forward import Terms
from pipeline.training.ledger import Ledger
from pipeline.training.norms import BlockNorms
from pipeline.training.rank_check import FIRST_STEPS, Pace, check_ranks

NUM_LEVELS = 8
"""Equal parts of t, from 0 to 1, by which losses are logged."""

PAUSED = "paused"


class Stopwatch:
    """Time by part of a step; on a GPU by events, read when a log waits for it anyway."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self.marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, part: str) -> None:
        """Count the time since the last mark as that of `part`."""
        now: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self.marks.append((part, now))

    def since(self, begin: int, *parts: str) -> dict[str, float]:
        """Seconds of some parts, or all, since mark number `begin`; on a GPU these must be over."""
        seconds: dict[str, float] = defaultdict(float)
        for (_, start), (part, end) in itertools.pairwise(self.marks[begin:]):
            if parts and part not in parts:
                continue
            seconds[part] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        return seconds

    def collect(self) -> dict[str, float]:
        """Seconds by part since the last call; starts anew."""
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        seconds = self.since(0)
        self.reset()
        return seconds


class LossMeter:
    """Sums of loss terms by noise level, on the device: nothing waits for it between logs.

    Its state belongs in the checkpoint, so that what is logged next is of the same steps after a resume.
    """

    def __init__(self, device: torch.device):
        self.names: tuple[str, ...] = ("loss",)
        self.sums = torch.zeros(NUM_LEVELS, 2, dtype=torch.float64, device=device)
        self.drawn: list[tuple[int, int, int]] = []
        """Each step's number and height and width of its latents, on which the t that it drew depend."""

    def state(self) -> dict[str, Any]:
        """The sums of every rank: their total is rounded in the order of the ranks. Collective."""
        sums = distributed.gather_objects(self.sums.tolist())
        return {"names": self.names, "sums": sums, "drawn": list(self.drawn)}

    def load(self, state: dict[str, Any]) -> None:
        self.names, self.drawn = tuple(state["names"]), [(s, h, w) for s, h, w in state["drawn"]]
        sums = self.sums.new_tensor(state["sums"])
        if len(sums) == distributed.world_size():
            self.sums = sums[distributed.rank()]
        else:
            self.sums = sums.sum(0) * distributed.is_main()

    def add(self, t: Tensor, terms: dict[str, Tensor]) -> None:
        """Add a micro-batch, t and each term (b,); every call has the same terms."""
        if self.names != tuple(terms):
            self.names = tuple(terms)
            self.sums = self.sums.new_zeros(NUM_LEVELS, 1 + len(terms))
        level = (t * NUM_LEVELS).long().clamp_(max=NUM_LEVELS - 1)
        rows = torch.stack([torch.ones_like(t), *terms.values()], dim=1).double()
        self.sums.index_add_(0, level, rows)

    def collect(self) -> dict[str, float]:
        """Means over all ranks since the last call; starts anew. Collective."""
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
                    values[f"loss_by_noise_level/{name}_t_{middle:.4f}"] = row[column] / row[0]
        return values


class Monitor:
    """TensorBoard, the line on the terminal and the rates; only rank 0 writes."""

    def __init__(
        self, config: TrainConfig, clock: Clock, meter: LossMeter, loader: Loader, engine: Any
    ):
        self.config, self.settings, self.run = config, config.monitor, Path(config.run)
        self.clock, self.meter, self.loader = clock, meter, loader
        self.objective = Objective(config.objective)
        self.device, self.exchange = torch.device(engine.device), Exchange()
        self.pace = Pace(distributed.world_size())
        self.stopwatch, self.profiler = Stopwatch(self.device), None
        self.shapes = Counter[tuple[int, int, int]]()
        """Steps by the height and width of their latents and by their number of text tokens."""
        self.ledger = Ledger(self.run)
        self.norms = BlockNorms(engine, self.device) if self.settings.block_norms else None
        # Points after the step that the run resumes from were written by steps that are lost.
        self.board = Board(self.run / "tensorboard", clock.step + 1 if clock.step else 0)
        self.flops: ModelFlops | None = None
        if distributed.is_main() and self.settings.mfu:
            # A device that is not in the table is measured.
            self.flops = ModelFlops(config.model)
            self.peak, source = peak_flops(self.device, config.engine.precision)
            self.board.add(text("peak", f"{source}; times {distributed.world_size()} ranks"))
        columns = [*Progress.get_default_columns(), MofNCompleteColumn()]
        self.progress = Progress(*columns, TextColumn("{task.fields[line]}"))
        self.task = self.progress.add_task(
            "train", total=clock.num_steps, completed=clock.step, line=""
        )
        if distributed.is_main() and self.progress.console.is_terminal:
            self.progress.start()
        self.restart()

    def restart(self) -> None:
        """Begin a new interval of rates."""
        self.since, self.since_step = time.perf_counter(), self.clock.step
        self.waited_before_s = self.loader.wait_s
        self.shapes.clear()
        self.stopwatch.reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave saving and drawing out of the rates."""
        self.mark("other")
        self.ledger.mark(self.ledger.steps)
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin
        self.mark(PAUSED)
        self.ledger.mark("save")

    def mark(self, part: str) -> None:
        """Count the time since the last mark as data, forward, backward, optimizer or other."""
        self.stopwatch.mark(part)

    def timed_next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; `log_samples` writes a line per sample: step, place, number."""
        self.mark("other")
        self.step_mark = len(self.stopwatch.marks) - 1
        batch = next(batches)
        self.mark("data")
        begins = self.clock.step - self.clock.start_step < FIRST_STEPS
        if begins or self.clock.due(self.settings.every_steps):
            check_ranks(batch)
        if self.settings.log_samples:
            path = self.run / "samples_seen" / f"rank_{distributed.rank():05d}.txt"
            places = zip(batch.indices.tolist(), batch.sample_ids.tolist(), strict=True)
            with distributed.beside("samples_seen"), append_to(path) as file:
                file.writelines(f"{batch.step} {index} {number}\n" for index, number in places)
        return batch

    def norms_if_due(self) -> BlockNorms | None:
        """What watches the optimizer in the next step, if that step is logged."""
        following = self.clock.step + 1
        logged = following % self.settings.every_steps == 0
        return self.norms if logged or following == self.clock.num_steps else None

    def count(self, batch: Batch, terms: list[Terms], accepted: bool) -> None:
        """Count a finished step."""
        if accepted:
            for part in terms:
                self.meter.add(part.t, part.named)
        self.meter.drawn.append((self.clock.step - 1, *batch.latent_size))
        text_length = 0 if batch.text_mask is None else batch.text_mask.shape[1]
        self.shapes[*batch.latent_size, text_length] += 1
        self._profile(self.clock.step)
        # Forward alone: from backward on, every rank waits for the slowest.
        seconds = self.stopwatch.since(self.step_mark, "data", "forward")
        self.exchange.seconds = sum(seconds.values())
        self.pace.add(self.exchange.everyones_seconds)
        self.ledger.stepped(self.clock.step, self.loader.wait_s)
        self.progress.update(self.task, completed=self.clock.step)

    def log(self, engine: Any, optimizer: WithEMA, rejected: int) -> None:
        """Means and rates since the last call, to TensorBoard and the terminal. Collective."""
        values = self.meter.collect()
        if self.config.data.on_corrupt == "skip":
            skipped = distributed.gather_objects(self.loader.skipped.samples)
            values["data/skipped_samples"] = float(sum(skipped))
        values |= {"optimizer/lr": optimizer.lr, "optimizer/rejected_steps": float(rejected)}
        values |= {f"optimizer/{name}_decay": decay for name, decay in optimizer.decays.items()}
        if (norm := grad_norm(engine, optimizer)) is not None:
            values["optimizer/grad_norm"] = norm
        if self.norms is not None and optimizer.watch is not None:
            values |= self.norms.collect(norm)
        if distributed.is_main():
            self._write(values)
        self.meter.drawn.clear()
        self.restart()

    def _write(self, values: dict[str, float]) -> None:
        self.mark("other")
        clock, elapsed = self.clock, time.perf_counter() - self.since
        steps = clock.step - self.since_step
        values |= self._speed(elapsed, steps)
        values["progress/images_seen"] = clock.images_seen
        values["speed/slowest_rank"] = float(self.pace.slowest())
        values["speed/goodput"] = self.ledger.goodput()
        self.ledger.write()
        seed, batch, drawn = self.loader.plan.seed, clock.global_batch, self.meter.drawn
        sizes = [(step, (self.loader.manifest.codec.channels, h, w)) for step, h, w in drawn]
        t = torch.cat([self.objective.draw_t(seed, step, batch, size) for step, size in sizes])
        alpha, sigma = self.objective.alpha_sigma(t)
        log_snr = 2 * (alpha / sigma).log().clamp(-20, 20)
        self.board.add(histogram("log_snr", log_snr.numpy(), bins=80), clock.step)
        self.scalars(values)
        line = f"loss {values['loss/train']:.4f}  {values['speed/images_per_s']:.1f} images/s"
        self.progress.update(self.task, line=line)
        if not self.progress.console.is_terminal:
            left = (clock.num_steps - clock.step) * elapsed / steps
            distributed.say(f"step {clock.step}/{clock.num_steps}  {line}  {left:.0f} s left")

    def _speed(self, elapsed: float, steps: int) -> dict[str, float]:
        """Rates of the interval. Tokens are the image's; FLOPs include padded text."""
        parts, batch = self.stopwatch.collect(), self.clock.global_batch
        values = {
            f"step_ms/{part}": 1000 * s / steps for part, s in parts.items() if part != PAUSED
        }
        values |= {
            "speed/images_per_s": steps * batch / elapsed,
            "speed/step_ms": 1000 * elapsed / steps,
            "speed/data_wait_fraction": (self.loader.wait_s - self.waited_before_s) / elapsed,
            "memory/peak_gib": peak_memory(self.device) / 2**30,
        }
        if self.flops is not None:
            patch = getattr(self.config.model, "patch_size", 1)
            tokens = sum(n * h * w for (h, w, _), n in self.shapes.items()) / patch**2
            flops = sum(n * self.flops.picture(*shape) for shape, n in self.shapes.items())
            values["speed/tokens_per_s"] = batch * tokens / elapsed
            values["speed/mfu"] = batch * flops / (self.peak * distributed.world_size() * elapsed)
        return values

    def describe(self, num_parameters: int) -> None:
        """Write the config as text and as hparams, and the layout of the pages."""
        self.board.add(text("config", f"```yaml\n{dump_config(self.config)}\n```"))
        self.board.add(text("model", f"{num_parameters:,} parameters"))
        self.board.add(custom_scalars(LAYOUT))
        flat = flatten(self.config.model_dump(mode="json"))
        known = (bool, int, float, str)
        plain = {k: v if isinstance(v, known) else str(v) for k, v in flat.items()}
        for part in hparams(plain, {"loss/train": 0.0}):
            self.board.add(part)
        self.board.flush()

    def _profile(self, step: int) -> None:
        """Start the trace after the step before its first; write it after its last."""
        if self.settings.profile_steps is None or not distributed.is_main():
            return
        first, last = self.settings.profile_steps
        if self.profiler is None and first - 1 <= step < last:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler is not None and step == last:
            self.profiler.stop()
            with distributed.beside("the trace"):
                path = self.run / "profile" / f"steps_{first}_{last}.json"
                path.parent.mkdir(exist_ok=True)
                self.profiler.export_chrome_trace(str(path))
            self.profiler = None

    def scalars(self, values: dict[str, float]) -> None:
        first = {f"at_a_glance/{n}": values[tag] for tag, n in GLANCE.items() if tag in values}
        for name, value in (first | values).items():
            self.board.add(scalar(name, value), self.clock.step)
        self.board.flush()

    def pictures(self, grid: UInt8[Tensor, "3 H W"]) -> None:
        """Show the prompts' pictures."""
        self.board.add(image("at_a_glance/samples", grid, dataformats="CHW"), self.clock.step)
        self.board.flush()

    def close(self) -> None:
        """Say where the time went, the last save's among it."""
        self.ledger.mark("save")
        self.ledger.write()
        distributed.say(self.ledger.line())
        self.progress.stop()
        self.board.flush()


def peak_memory(device: torch.device) -> int:
    """The most bytes so far, allocated on the GPU or else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
