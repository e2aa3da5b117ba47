"""Exponential moving average of the weights, fp32, as one more state of the optimizer.

DeepSpeed hands the optimizer the fp32 partition that a rank owns. Keeping the average there, beside
Adam's moments, partitions it, checkpoints it and restores it with them, at every ZeRO stage, for
4 bytes a parameter divided by the ranks. It is gathered only to sample, evaluate, save and export.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.config import Config
from pipeline import distributed


class EMAConfig(Config):
    """Half-life in pictures, so that it means the same at any batch size (EDM2 2312.02696)."""

    halflife_images: float = Field(default=500_000, gt=0)
    # While young, the half-life is this share of the pictures seen, so that the start is forgotten.
    rampup_ratio: float = Field(default=0.05, gt=0)


def ema_decay(config: EMAConfig, images_seen: int, global_batch: int) -> float:
    """Decay of one step after `images_seen` pictures (EDM 2206.00364, training_loop)."""
    halflife = min(config.halflife_images, images_seen * config.rampup_ratio)
    return 0.5 ** (global_batch / max(halflife, 1e-8))


class AdamWithEMA(torch.optim.AdamW):
    """AdamW with an `ema` state a parameter: ema <- decay ema + (1 - decay) parameter after each step.

    A step that DeepSpeed skips (NaN, overflow) never reaches it, so the average skips it as well.
    Where no wrapper of DeepSpeed's looks at the gradients (stage 0 in fp32), `clip` has it done here.
    """

    ema_decay: float = 0.0
    clip: float | None = None  # 0: measure the norm only
    grad_norm: float | None = None
    num_skipped: int = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if self.clip is not None:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
            self.grad_norm = float(norm)
            if not math.isfinite(self.grad_norm):  # the same on all ranks: gradients are reduced
                self.num_skipped += 1
                return None
        before = {p: p.detach().clone() for p in parameters if "ema" not in self.state[p]}
        loss = super().step(closure)
        for parameter, weights in before.items():
            self.state[parameter]["ema"] = weights
        averages = [self.state[p]["ema"] for p in parameters]
        if averages:
            torch._foreach_lerp_(averages, parameters, 1.0 - self.ema_decay)  # pyright: ignore[reportPrivateImportUsage]
        return loss


def masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Each parameter's fp32 master where no ZeRO partitions it (stage 0)."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):  # bf16 beside whole fp32 copies
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {p: m for low, high in pairs for p, m in zip(low, high, strict=True)}
    return {p: p for g in optimizer.param_groups for p in g["params"]}


@torch.no_grad()
def full_weights(
    engine: Any, optimizer: AdamWithEMA, which: Literal["ema", "raw"]
) -> dict[str, Tensor]:
    """All fp32 weights by name on rank 0's CPU; an empty dict elsewhere. Collective.

    One parameter at a time, so that no device holds more than the largest beside its own.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    averaged = which == "ema" and any("ema" in state for state in optimizer.state.values())
    whole = masters(engine) if engine.zero_optimization_stage() == 0 else None
    if whole is None and averaged and hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # Loading a checkpoint replaces the state that the first step linked to the parameters.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if whole is not None:
            master = whole[parameter]
            value = optimizer.state[master]["ema"] if averaged else master
        elif averaged:
            value = safe_get_full_optimizer_state(parameter, "ema")
        else:
            value = safe_get_full_fp32_param(parameter)
        assert value is not None
        if distributed.is_main():
            weights[name] = value.detach().float().cpu().clone()
    return weights
