"""Exponential moving averages of the weights in fp32, kept as states of the optimizer.

DeepSpeed hands the optimizer the fp32 partition that a rank owns. Kept beside Adam's moments, the
averages are partitioned with them at every ZeRO stage: 4 bytes per parameter and average, divided by
the ranks. They are saved as they lie; only a preview during training gathers them.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.config import EMAConfig, power_exponent


def ema_decays(
    config: EMAConfig, images_seen: int, global_batch: int, begun: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Each average's decay in the step after `images_seen` pictures, which began after `begun` (by name) of them.

    Half-lives are ramped up as in EDM (2206.00364, training_loop). A power-function average decays
    by (1 - 1/t)^(gamma + 1), EDM2 eq. 127.
    """
    decays = {}
    for name, (kind, value) in config.names().items():
        images = images_seen - (begun or {}).get(name, 0)
        if kind == "halflife":
            halflife = min(value, images * config.rampup_ratio)
            decays[name] = 0.5 ** (global_batch / max(halflife, 1e-8))
        else:
            share = images / (images + global_batch)
            decays[name] = share ** (power_exponent(value) + 1)
    return decays


Watch = Callable[[list[Tensor], Any], AbstractContextManager[None]]
"""Looks at the tensors that an optimizer steps on, and at its state, before and after the step."""


class WithEMA(torch.optim.Optimizer):
    """A mixin before an optimizer class: ema <- decay ema + (1 - decay) parameter.

    A step that DeepSpeed skips (NaN, overflow) never reaches the optimizer, so the averages skip it
    as well. `clip` bounds the gradient's norm, which `wrapper` has measured, DeepSpeed's optimizer around
    this one; without one (stage 0 in fp32) it is measured here. 0 does not bound it. `num_taken` grows with
    each step that is not skipped.
    """

    lr: float = 0.0
    decays: dict[str, float] = {"ema": 0.0}
    clip: float | None = None
    watch: Watch | None = None
    wrapper: Any = None
    grad_norm: float | None = None
    num_taken: int = 0

    def prepare(self, lr: float, decays: dict[str, float], watch: Watch | None) -> None:
        """Set what holds for the next step alone; each group scales `lr` by its own factor."""
        self.lr, self.decays, self.watch = lr, decays, watch
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if self.wrapper is not None:
            norm = torch.as_tensor(self.wrapper._global_grad_norm)
            nn.utils.clip_grads_with_norm_(parameters, self.clip or math.inf, norm)
        elif self.clip is not None:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
            self.grad_norm = float(norm)
            # All ranks see the same norm, because the gradients are reduced already.
            if not math.isfinite(self.grad_norm):
                return None
        self.num_taken += 1
        with self.watch(parameters, self.state) if self.watch else nullcontext():
            # An average begins as the weights before the step, but Adam makes its states in it.
            missing = [p for p in parameters if self.decays.keys() - self.state[p].keys()]
            begun = {p: p.detach().clone() for p in missing}
            loss = super().step(closure)
            for parameter, weights in begun.items():
                for name in self.decays:
                    self.state[parameter].setdefault(name, weights.clone())
            for name, decay in self.decays.items() if parameters else ():
                averages = [self.state[p][name] for p in parameters]
                torch._foreach_lerp_(averages, parameters, 1.0 - decay)
        return loss
