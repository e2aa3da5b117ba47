"""Exponential moving averages of the weights, fp32, as more states of the optimizer.

DeepSpeed hands the optimizer the fp32 partition that a rank owns. Keeping the averages there, beside
Adam's moments, partitions them with it at every ZeRO stage: 4 bytes per parameter and average, divided by
the ranks. They are saved as they lie; only a preview of the run in training gathers them.
"""

import math
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.config import Config, InputError


class EMAConfig(Config):
    """Half-lives in pictures, so that they mean the same at any batch size (EDM2 2312.02696).

    Averages are named `ema` (the first half-life), `ema_halflife_N` and `ema_sigma_X`.
    """

    halflife_images: float = Field(default=500_000, gt=0)
    # While young, the half-life is this share of the pictures seen, so that the start is forgotten.
    rampup_ratio: float = Field(default=0.05, gt=0)
    more_halflives_images: list[float] = []
    # Power-function averages (EDM2 section 3) by relative width; two, [0.05, 0.1], and their snapshots
    # let `flowmill ema` make one of any width after training.
    sigma_rels: list[float] = []
    snapshot_images: int = Field(default=0, ge=0)  # between snapshots of `sigma_rels`; 0: none

    @model_validator(mode="after")
    def _sensible(self) -> "EMAConfig":
        for sigma_rel in self.sigma_rels:
            power_exponent(sigma_rel)
        if self.snapshot_images and not self.sigma_rels:
            raise ValueError("snapshot_images: no effect without sigma_rels; [0.05, 0.1] is usual")
        if any(halflife <= 0 for halflife in self.more_halflives_images):
            raise ValueError("more_halflives_images: expected numbers above 0")
        if len(self.names()) != 1 + len(self.more_halflives_images) + len(self.sigma_rels):
            raise ValueError("more_halflives_images, sigma_rels: one of them is given twice")
        return self

    def names(self) -> dict[str, tuple[str, float]]:
        """Every average: its name, "halflife" or "sigma_rel", and which."""
        halflives = {f"ema_halflife_{h:.0f}": ("halflife", h) for h in self.more_halflives_images}
        powers = {power_name(s): ("sigma_rel", s) for s in self.sigma_rels}
        return {"ema": ("halflife", self.halflife_images), **halflives, **powers}


def power_name(sigma_rel: float) -> str:
    return f"ema_sigma_{sigma_rel:g}"


@lru_cache
def power_exponent(sigma_rel: float) -> float:
    """gamma of the profile t^gamma whose standard deviation is sigma_rel of the training time.

    EDM2 2312.02696, eq. 123 and algorithm 2: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    if not 0 < sigma_rel < 12**-0.5:  # gamma = 0, all weights alike, is 0.2887
        raise InputError(f"sigma_rel: got {sigma_rel:g}, expected between 0 and 0.2886")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def ema_decays(config: EMAConfig, images_seen: int, global_batch: int) -> dict[str, float]:
    """Each average's decay in the step after `images_seen` pictures.

    A half-life, ramped up: EDM 2206.00364, training_loop. A power: EDM2 eq. 127, (1 - 1/t)^(gamma + 1).
    """
    decays = {}
    for name, (kind, value) in config.names().items():
        if kind == "halflife":
            halflife = min(value, images_seen * config.rampup_ratio)
            decays[name] = 0.5 ** (global_batch / max(halflife, 1e-8))
        else:
            share = images_seen / (images_seen + global_batch)
            decays[name] = share ** (power_exponent(value) + 1)
    return decays


class Watch(Protocol):
    """Looks at the tensors that an optimizer steps, before and after, when it is asked to."""

    def before(self, parameters: list[Tensor]) -> None: ...
    def after(self, parameters: list[Tensor], state: Any) -> None: ...


class WithEMA(torch.optim.Optimizer):
    """Before an optimizer class: one state per parameter and average, ema <- decay ema + (1 - decay) parameter.

    A step that DeepSpeed skips (NaN, overflow) never reaches it, so the averages skip it as well.
    Where no wrapper of DeepSpeed's looks at the gradients (stage 0 in fp32), `clip` has it done here.
    While `veto` holds a reason, a step changes nothing.
    """

    lr: float = 0.0
    decays: dict[str, float] = {"ema": 0.0}  # of each average
    clip: float | None = None  # 0: measure the norm only
    watch: Watch | None = None  # of this step alone
    veto: str = ""
    grad_norm: float | None = None
    num_skipped: int = 0

    def prepare(self, lr: float, decays: dict[str, float], watch: Watch | None) -> None:
        """Set what holds for the next step alone; `lr` is scaled by the group's own factor."""
        self.lr, self.decays, self.watch = lr, decays, watch
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def scalars(self) -> dict[str, float]:
        """What the last step was taken with, for the log."""
        decays = {f"optimizer/{name}_decay": decay for name, decay in self.decays.items()}
        return {"optimizer/lr": self.lr, **decays}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.veto:
            return None
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if self.clip is not None:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
            self.grad_norm = float(norm)
            if not math.isfinite(self.grad_norm):  # the same on all ranks: gradients are reduced
                self.num_skipped += 1
                return None
        if self.watch is not None:
            self.watch.before(parameters)
        new = [p for p in parameters if self.decays.keys() - self.state[p].keys()]
        begun = [p.detach().clone() for p in new]  # Adam's own states begin in its step
        loss = super().step(closure)
        for parameter, weights in zip(new, begun, strict=True):
            for name in self.decays:
                self.state[parameter].setdefault(name, weights.clone())
        for name, decay in self.decays.items() if parameters else ():
            averages = [self.state[p][name] for p in parameters]
            torch._foreach_lerp_(averages, parameters, 1.0 - decay)
        if self.watch is not None:
            self.watch.after(parameters, self.state)
        return loss


class AdamWithEMA(WithEMA, torch.optim.AdamW):
    """AdamW and averages of the weights."""
