"""Progress of a run in pictures, from which learning rate, decays and what is due follow."""

from typing import Any

from pipeline.config import TrainConfig
from pipeline.training.ema import ema_decays
from pipeline.training.engine import lr_schedule


class Clock:
    """Steps taken, pictures seen, and pictures learned from.

    `images_learned` omits the pictures of rejected steps, which advance neither schedule nor averages.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.global_batch = config, config.training.global_batch
        self.lr_of = lr_schedule(config.optimizer, self.global_batch, config.training.num_steps)
        self.start_step = self.step = self.images_seen = self.images_learned = 0
        self.ema_begun = dict.fromkeys(config.ema.names(), 0)
        """Pictures learned from before each average began: more than 0 where it was added later."""

    @property
    def next_batch(self) -> int:
        """Number of the loader's batch for the next step."""
        return self.images_seen // self.global_batch

    @property
    def num_steps(self) -> int:
        """Number of the run's last step."""
        left = max(0, self.config.training.images - self.images_seen)
        return self.step - (-left // self.global_batch)

    @property
    def finished(self) -> bool:
        return self.images_seen >= self.config.training.images

    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.lr_of(self.images_learned // self.global_batch)

    def ema_decays(self) -> dict[str, float]:
        """Decay of every average in the next step, by name."""
        return ema_decays(self.config.ema, self.images_learned, self.global_batch, self.ema_begun)

    def advance(self, accepted: bool) -> None:
        """Count a step, accepted or rejected."""
        self.step += 1
        self.images_seen += self.global_batch
        self.images_learned += self.global_batch * accepted

    def due(self, every_steps: int) -> bool:
        """Whether the step just taken is a multiple of `every_steps`, or the run's last."""
        return self.step % every_steps == 0 or self.finished

    @property
    def preview_due(self) -> bool:
        return self.due(self.config.monitor.sample_every_steps)

    @property
    def snapshot_due(self) -> bool:
        """Whether the averages that `flowmill ema` needs are to be stored."""
        every = self.config.ema.snapshot_images
        return every > 0 and self.due(max(1, every // self.global_batch))

    def state(self) -> dict[str, Any]:
        names = ("step", "images_seen", "images_learned", "ema_begun")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a batch that a new batch size would cut is seen again."""
        self.start_step = self.step = state["step"]
        for name in ("images_seen", "images_learned"):
            setattr(self, name, state[name] // self.global_batch * self.global_batch)
        begun = state["ema_begun"]
        self.ema_begun = {name: begun.get(name, self.images_learned) for name in self.ema_begun}
