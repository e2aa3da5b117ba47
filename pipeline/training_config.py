"""Configs of what training is made of. Pydantic alone, so that reading a config imports no torch."""

from pydantic import Field

from models.config import Config


class MonitorConfig(Config):
    """What a run shows, and how often."""

    every_steps: int = Field(default=50, gt=0)
    """Steps between two lines of the log, and between two points in TensorBoard."""

    sample_every_steps: int = Field(default=1000, gt=0)
    """Steps between two looks: the prompts' pictures and the held-out error."""

    prompts: list[str] = []
    """Drawn at the same noise each time, with the EMA weights."""

    heldout_samples: int = Field(default=64, ge=0)
    """Held-out samples that each look measures; 0: none."""

    mfu: bool = True
    """Counts the model's FLOPs; on a device that no table knows this times it once, for seconds."""

    block_norms: bool = True
    """Norms by block of gradient, update, weights and distance to the EMA, in logged steps only."""

    profile_steps: tuple[int, int] | None = None
    """First and last step to trace into RUN/profile, for chrome://tracing."""

    log_samples: bool = False
    """Writes down the samples of every step in RUN/samples_seen/."""


class RejectionConfig(Config):
    """Which steps are not taken."""

    max_in_a_row: int = Field(default=10, gt=0)
    """Rejected steps in a row after which the run stops."""

    spike_factor: float | None = Field(default=None, gt=1)
    """Rejects a loss above so many times the mean of the last `window` accepted ones; null: none."""

    window: int = Field(default=100, gt=0)
    """Accepted steps that the mean is over; no spike is seen before there are as many."""
