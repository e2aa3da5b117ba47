"""What training shows of itself now and then: pictures of fixed prompts, and the error on held-out samples."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.schema.recorded import load_encoders
from models.files import write_whole
from pipeline import distributed
from pipeline.distributed.stop_signal import StopSignal
from pipeline.inference.grid import grid
from pipeline.inference.heldout import means_by_noise_level, terms_by_part
from pipeline.inference.latent_check import check_latents
from pipeline.inference.painter import Painter, largest_bucket
from pipeline.objectives.objective import Objective
from pipeline.runs.setup import Run, network_for_sampling, sampling_dtype
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
        self.prompts = config.monitor.prompts
        # Ranks share the prompts, and encode their own alone.
        self.places = list(range(len(self.prompts)))[distributed.rank() :: distributed.world_size()]
        codec = None
        if self.places:
            folders, own = config.encoders, [self.prompts[place] for place in self.places]
            encoders = load_encoders(self.manifest, folders.vae, folders.text, self.device)
            self.painter, codec = Painter(encoders, own, config.model.num_classes), encoders.codec
        if self.prompts and config.data.check and not run.begun:
            ranks = min(len(self.prompts), distributed.world_size())
            check_latents(run.loader, codec, config.data.check, ranks)
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
        """Held-out loss, raw and EMA, and the fixed prompts at the fixed noise. Collective: ranks share the work.

        A signal to stop ends it: a launcher's grace is for saving. The resumed run looks again.
        """
        before, self.last_step = self.last_step, step
        dtype = sampling_dtype(self.run.config, self.device)
        for which in ("ema", "raw") if self.heldout else ("ema",):
            weights = full_weights(engine, optimizer, which, dtype)
            network = network_for_sampling(self.run.config, weights, self.device)
            network.register_forward_pre_hook(self._give_way)
            try:
                mine = self._look(network, which)
            except Stopped:
                mine = None
            parts = distributed.gather_objects(mine)
            if None in parts:
                self.last_step = before
                break
            if distributed.is_main():
                terms, pictures = (_dealt(list(part)) for part in zip(*parts, strict=True))
                self._publish(which, terms, pictures, monitor, step)
        monitor.ledger.mark("look")

    def _give_way(self, *_: object) -> None:
        if self.stop.name is not None:
            raise Stopped

    def _look(self, network: nn.Module, which: str) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parts of the held-out terms, and its pictures."""
        codec, size = self.manifest.codec, self.run.micro_batch
        terms = terms_by_part(network, self.objective, codec, self.heldout, size)
        if self.painter is None or which != "ema":
            return terms, []
        sampler, bucket = self.run.config.sampler, largest_bucket(self.manifest)
        return terms, list(self.painter.draw(network, self.objective, sampler, bucket, self.places))

    def _publish(
        self, which: str, terms: list[Tensor], pictures: list[Tensor], monitor: Monitor, step: int
    ) -> None:
        if terms:
            values = means_by_noise_level(terms)
            monitor.scalars({f"heldout_{which}/{name}": v for name, v in values.items()})
        if pictures:
            sheet = grid(torch.stack(pictures), self.prompts, columns=5)
            path = self.run.folder / "samples" / f"step_{step:08d}.png"
            with distributed.beside("the pictures"):
                write_whole(path, partial(sheet.save, format="PNG"))
            monitor.pictures(torch.from_numpy(np.array(sheet)).permute(2, 0, 1))


def _dealt(hands: list[list[Tensor]]) -> list[Tensor]:
    """What was dealt to the ranks by turns, in its order."""
    rounds = itertools.zip_longest(*hands)
    return [card for cards in rounds for card in cards if card is not None]
