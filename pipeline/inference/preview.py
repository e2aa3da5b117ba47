"""What training shows of itself now and then: pictures of fixed prompts, and the error on held-out samples."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.data.encoders import load_encoders
from pipeline.distributed.stop_signal import StopSignal
from pipeline.inference.grid import grid
from pipeline.inference.heldout import by_noise_level
from pipeline.inference.painter import Painter, largest_bucket
from pipeline.objectives.objective import Objective
from pipeline.runs.setup import Run, network_for_sampling
from pipeline.training.clock import Clock
from pipeline.training.ema import WithEMA
from pipeline.training.monitor import Monitor
from pipeline.training.pieces import full_weights


class Stopped(Exception):
    """Whoever draws is asked to stop."""


class Preview:
    """The run's prompts, encoded once, and its held-out samples. Its state belongs in the checkpoint."""

    def __init__(self, run: Run, objective: Objective, stop: StopSignal):
        config = run.config
        self.run, self.objective, self.stop = run, objective, stop
        self.manifest, self.device = run.loader.manifest, distributed.own_device()
        self.painter: Painter | None = None
        if config.monitor.prompts and distributed.is_main():
            folders = config.encoders
            encoders = load_encoders(self.manifest, folders.vae, folders.text, self.device)
            self.painter = Painter(encoders, config.monitor.prompts, config.model.num_classes)
        samples = config.monitor.heldout_samples
        heldout = run.loader.heldout_batches(samples) if samples else []
        self.heldout = [batch.to(self.device) for batch in heldout]
        self.wanted = bool(config.monitor.prompts or heldout)
        self.last_step: int | None = None

    def due(self, clock: Clock) -> bool:
        return self.wanted and clock.preview_due and self.last_step != clock.step

    def state(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load(self, state: dict[str, Any]) -> None:
        self.last_step = state["last_step"]

    def show(self, engine: Any, optimizer: WithEMA, monitor: Monitor, step: int) -> None:
        """Held-out loss, raw and EMA, and the fixed prompts at the fixed noise. Collective: rank 0 works.

        A signal to stop ends it: a launcher's grace is for saving. The resumed run looks again.
        """
        before, self.last_step = self.last_step, step
        for which in ("ema", "raw") if self.heldout else ("ema",):
            weights = full_weights(engine, optimizer, which)
            if not distributed.is_main() or self.last_step != step:
                continue
            network = network_for_sampling(self.run.config, weights, self.device)
            network.register_forward_pre_hook(self._give_way)
            try:
                self._look(network, which, monitor, step)
            except Stopped:
                self.last_step = before
        monitor.ledger.mark("look")

    def _give_way(self, *_: object) -> None:
        if self.stop.name is not None:
            raise Stopped

    def _look(self, network: nn.Module, which: str, monitor: Monitor, step: int) -> None:
        if self.heldout:
            codec, size = self.manifest.codec, self.run.micro_batch
            values = by_noise_level(network, self.objective, codec, self.heldout, size)
            monitor.scalars({f"heldout_{which}/{name}": v for name, v in values.items()})
        if self.painter is not None and which == "ema":
            monitor.pictures("samples/ema", self._draw_sheet(self.painter, network, step))

    def _draw_sheet(self, painter: Painter, network: nn.Module, step: int) -> Tensor:
        """The prompts' pictures as one, uint8 (3, H, W), also in the run's samples."""
        size = largest_bucket(self.manifest)
        pictures = painter.draw(network, self.objective, self.run.config.sampler, size)
        sheet = grid(pictures, painter.prompts, columns=5)
        folder = self.run.folder / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step_{step:08d}.png")
        return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
