"""Configs of what training is made of. Importing them loads no torch."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from models.config import Config, InputError

GPUS = {
    "B200": (2250.0, 180), "H200": (989.0, 141), "H100 PCIe": (756.0, 80), "H100": (989.0, 80),
    "A100": (312.0, 80), "L40S": (362.0, 48), "A10G": (70.0, 24), "RTX 4090": (165.0, 24),
}  # fmt: skip
"""bf16 TFLOP/s from the makers' data sheets, without sparsity, and GiB, by a part of torch's device name."""

Beta = Annotated[float, Field(ge=0, lt=1)]
Halflife = Annotated[float, Field(gt=0)]
Schedule = Literal["constant_with_warmup", "cosine", "linear", "warmup_stable_decay"]


class OptimizerConfig(Config):
    kind: Literal["adamw", "muon"] = "adamw"
    """muon steps on the blocks' matrices, with AdamW's lr, and leaves the rest to AdamW."""
    lr: float = Field(default=1e-4, gt=0)
    """Holds for this global batch; nothing rescales it."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Applies to matrices only, not to biases, norms and embeddings."""
    schedule: Schedule = "constant_with_warmup"
    warmup_images: int = Field(default=0, ge=0)
    decay_images: int = Field(default=0, ge=0)
    """Length of the last part of warmup_stable_decay."""
    clip: float = Field(default=1.0, ge=0)
    """Largest global norm of the gradient; 0: not clipped."""

    def refusals(self) -> Iterator[str]:
        if (self.decay_images > 0) != (self.schedule == "warmup_stable_decay"):
            yield (
                f"decay_images: got {self.decay_images} with schedule {self.schedule}; warmup_stable_decay "
                "needs a number above 0, and on the others it has no effect"
            )


class EngineConfig(Config):
    """How work is laid out over memory and ranks: it changes speed, and results by rounding."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 has fp32 masters, moments and EMA; auto is bf16 where the hardware has it."""
    hpz_partition_size: int | None = Field(default=None, gt=1)
    """Ranks of a node that keep all weights among them, so that ZeRO 3 gathers them within nodes in
    backward (ZeRO++ 2306.10209); null: it gathers from all ranks."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Pictures per rank at once; null: the rank's whole share."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where ZeRO keeps its partitions of the optimizer."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where ZeRO 3 keeps its partitions of the parameters."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over ranks; bf16 sends half as much."""
    compile: bool | Literal["auto"] = "auto"
    """Compiles each block; auto: on a GPU at zero_stage 0 to 2."""
    deterministic: bool = False
    """The same bits from the same steps on a GPU too, by slower kernels."""
    cpu_threads: int | None = Field(default=None, gt=0)
    """Threads per rank on CPU; null: its share of the cores."""
    timeout_s: float = Field(default=1800, gt=0)
    """Longest time of a collective, and of a step."""
    heartbeat_timeout_s: float = Field(default=120, gt=0)
    """Silence of a rank that ends the run."""

    def refusals(self) -> Iterator[str]:
        least = {"offload_optimizer": 1, "offload_parameters": 3, "hpz_partition_size": 3}
        for name, stage in least.items():
            if getattr(self, name) not in ("none", None) and self.zero_stage < stage:
                yield f"{name}: no effect with zero_stage {self.zero_stage}, expected at least {stage}"


class EMAConfig(Config):
    """Averages of the weights; half-lives in pictures hold at any batch size (EDM2 2312.02696).

    The averages are named `ema` (the first half-life), `ema_halflife_N` and `ema_sigma_X`.
    """

    halflife_images: Halflife = 500_000
    rampup_ratio: float = Field(default=0.05, gt=0)
    """Bounds the half-life by this share of the pictures seen: the first weights are forgotten."""
    more_halflives_images: list[Halflife] = []
    sigma_rels: list[float] = []
    """Relative widths of power-function averages (EDM2, 3); with snapshots, [0.05, 0.1] give any."""
    snapshot_images: int = Field(default=0, ge=0)
    """Pictures between two snapshots of `sigma_rels`; 0: no snapshots."""

    def refusals(self) -> Iterator[str]:
        for sigma_rel in self.sigma_rels:
            power_exponent(sigma_rel)
        if self.snapshot_images and not self.sigma_rels:
            yield "snapshot_images: no effect without sigma_rels; [0.05, 0.1] is usual"
        if len(self.names()) != 1 + len(self.more_halflives_images) + len(self.sigma_rels):
            yield "more_halflives_images, sigma_rels: one of them is given twice"

    def names(self) -> dict[str, tuple[str, float]]:
        """Every average by name: "halflife" or "sigma_rel", and its value."""
        halflives = {f"ema_halflife_{h:.0f}": ("halflife", h) for h in self.more_halflives_images}
        powers = {power_name(s): ("sigma_rel", s) for s in self.sigma_rels}
        return {"ema": ("halflife", self.halflife_images), **halflives, **powers}


def power_name(sigma_rel: float) -> str:
    return f"ema_sigma_{sigma_rel:g}"


@lru_cache
def power_exponent(sigma_rel: float) -> float:
    """The gamma of the profile t^gamma whose standard deviation is sigma_rel of the training time.

    EDM2 2312.02696, eq. 123 and algorithm 2: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    # gamma = 0, where all weights are alike, is 0.2887.
    if not 0 < sigma_rel < 12**-0.5:
        raise InputError(f"sigma_rel: got {sigma_rel:g}, expected between 0 and 0.2886")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=3, gt=0)
    """How many of the newest checkpoints are kept."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Keeps for good those of every so many steps."""

    def refusals(self) -> Iterator[str]:
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            yield (
                f"keep_every_steps: got {self.keep_every_steps}, expected a multiple of every_steps, "
                f"{self.every_steps}: no checkpoint is written at the others"
            )


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
    """Counts the model's FLOPs; a device whose peak is not known is timed once, for seconds."""
    block_norms: bool = True
    """Norms by block of gradient, update, weights and distance to the EMA, in logged steps only."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to trace into RUN/profile, for chrome://tracing."""
    log_samples: bool = False
    """Writes the samples of every step to RUN/samples_seen/."""

    def refusals(self) -> Iterator[str]:
        first, last = self.profile_steps or (1, 1)
        if not 1 <= first <= last:
            yield f"profile_steps: got [{first}, {last}], expected a first step of at least 1 and then the last"


class RejectionConfig(Config):
    """Which steps are not taken."""

    max_in_a_row: int = Field(default=10, gt=0)
    """Rejected steps in a row after which the run stops."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Rejects a loss above so many times the mean of the last `window` accepted; null: none."""
    window: int = Field(default=100, gt=0)
    """Accepted steps that the mean is taken over; no spike is found before there are as many."""

    def refusals(self) -> Iterator[str]:
        default = RejectionConfig.model_fields["window"].default
        if self.spike_factor is None and self.window != default:
            yield "window: no effect without spike_factor"
