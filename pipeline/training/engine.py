"""The DeepSpeed engine: its config, the parameter groups, the optimizer and the LR schedule."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from models.config import InputError
from models.layers import compile_blocks
from models.roles import parameter_roles, shape_of
from pipeline import distributed
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.ema import WithEMA
from pipeline.training.optimizers import OPTIMIZERS, MuonWithEMA, muon_rounds

BUCKET_ELEMENTS = 50_000_000
"""Most elements of gradients reduced at once: with several, backward can hide all but the last."""

PERSISTENT_ELEMENTS = 100_000
"""ZeRO 3 leaves smaller parameters whole, DeepSpeed's default."""

LIVE_ELEMENTS = 1_000_000_000
"""ZeRO 3 keeps so many gathered from forward to backward, DeepSpeed's default; others it gathers again."""


def micro_batch_size(config: EngineConfig, global_batch: int) -> int:
    """Pictures per rank and forward; raises InputError where they do not divide the batch."""
    ranks = distributed.world_size()
    share, rest = divmod(global_batch, ranks)
    if rest:
        raise InputError(
            f"training.global_batch: got {global_batch}, expected a multiple of the {ranks} ranks"
        )
    size = config.micro_batch or share
    if share % size:
        raise InputError(
            f"engine.micro_batch: got {size}, expected a divisor of {share}, one rank's share of the "
            f"global batch of {global_batch}"
        )
    return size


def resolved(engine: EngineConfig, begun: EngineConfig | None) -> EngineConfig:
    """The engine with each `auto` replaced: as the run began, or as suits this machine."""
    suits: dict[str, Any] = dict(begun or ())
    if begun is None:
        gpu = distributed.own_device().type == "cuda"
        # Emulated bf16 would be slower than fp32.
        native = (
            torch.cuda.is_bf16_supported(False) if gpu else torch.cpu._is_avx512_bf16_supported()
        )
        # At stage 3 its hooks break graphs, and on CPUs compiled blocks were slower.
        suits = {
            "precision": "bf16" if native else "fp32",
            "compile": gpu and engine.zero_stage < 3,
        }
    update = {n: suits[n] for n in ("precision", "compile") if getattr(engine, n) == "auto"}
    return engine.model_copy(update=update)


def check_engine(engine: EngineConfig, micro_steps: int) -> None:
    """Raise InputError where a step would be summed in too low a precision."""
    if engine.precision == "bf16" and engine.zero_stage == 0 and micro_steps > 1:
        raise InputError(
            f"engine.micro_batch: {micro_steps} micro-batches a step would be summed in bf16 at zero_stage 0. "
            "Remedy: engine.zero_stage=1, which sums in fp32 and on one rank needs no more memory"
        )


def parameter_groups(model: nn.Module, weight_decay: float, muon: bool) -> list[dict[str, Any]]:
    """Parameters by decay (matrices have it), scale of the LR, and whether Muon steps on them."""
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    parameters = dict(model.named_parameters())
    for name, role in sorted(parameter_roles(model).items(), key=lambda item: not item[1].decay):
        by_muon = role.hidden and muon
        # Muon's step does not depend on the width, so it needs no scale.
        key = (by_muon, role.decay, 1.0 if by_muon else role.lr_scale)
        groups.setdefault(key, []).append(parameters[name])
    return [
        {"params": p, "muon": m, "weight_decay": weight_decay * decays, "lr_scale": scale}
        for (m, decays, scale), p in groups.items()
    ]


def lr_schedule(
    config: OptimizerConfig, global_batch: int, num_steps: int
) -> Callable[[int], float]:
    """transformers' schedule as a function of the step alone, so that resuming needs no state."""
    warmup, extra = config.warmup_images // global_batch, {}
    if config.schedule == "warmup_stable_decay":
        extra = {"num_decay_steps": config.decay_images // global_batch}
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    # The schedules give 0 at the first step of a warm-up and after the last step of the run, where a
    # step would be wasted: with a warm-up, steps count from 1.
    first = int(warmup > 0)
    scheduler = get_scheduler(config.schedule, dummy, warmup, num_steps + first, extra)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]  # pyright: ignore[reportAttributeAccessIssue]
    return lambda step: config.lr * factor(step + first)


def deepspeed_config(engine: EngineConfig, micro_batch: int, global_batch: int) -> dict:
    zero: dict[str, Any] = {"stage": engine.zero_stage, "overlap_comm": engine.zero_stage > 0}
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": engine.offload_optimizer}
    if engine.offload_parameters != "none":
        zero["offload_param"] = {"device": engine.offload_parameters}
    if engine.zero_stage == 3:
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE_ELEMENTS
    if engine.hpz_partition_size:
        zero["zero_hpz_partition_size"] = engine.hpz_partition_size
    bf16 = engine.precision == "bf16"
    config: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        # It would wait for the GPU once more per group of parameters.
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "communication_data_type": engine.reduce_precision,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW, which keeps the averages, steps on the host as well.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        # It waits for the device twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if bf16 and engine.zero_stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def grad_norm(engine: Any, optimizer: WithEMA) -> float | None:
    """Norm of the last step's gradient before clipping, over all parameters and ranks."""
    norm = engine.get_global_grad_norm() if optimizer.wrapper else optimizer.grad_norm
    return None if norm is None else float(norm)


def build_engine(
    model: nn.Module,
    engine_config: EngineConfig,
    optimizer_config: OptimizerConfig,
    global_batch: int,
) -> tuple[Any, WithEMA]:
    """DeepSpeed's engine around `model`, and the optimizer that it drives."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # With ZeRO 3, DeepSpeed's own calls would cause this warning twice per step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    kind, decay = OPTIMIZERS[optimizer_config.kind], optimizer_config.weight_decay
    groups = parameter_groups(model, decay, muon=kind is MuonWithEMA)
    # The LR is 0 because DeepSpeed may step once while it sets up.
    options: dict[str, Any] = {"lr": 0.0, "betas": optimizer_config.betas}
    options |= {"eps": optimizer_config.eps}
    if issubclass(kind, torch.optim.AdamW):
        options["fused"] = True
    optimizer = kind(groups, **options)
    if engine_config.compile is True:
        # The hooks of ZeRO 3 break graphs.
        compile_blocks(model, fullgraph=engine_config.zero_stage < 3)
    micro_batch = micro_batch_size(engine_config, global_batch)
    settings = deepspeed_config(engine_config, micro_batch, global_batch)
    # ZeRO 3 holds a bucket all the time, so it is no larger than the model.
    bucket = min(BUCKET_ELEMENTS, sum(shape_of(p).numel() for p in model.parameters()))
    settings["zero_optimization"]["reduce_bucket_size"] = bucket
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,  # pyright: ignore[reportArgumentType]
        config=settings,
        dist_init_required=False,
    )
    # Some stages step on zero gradients to allocate state: Adam's bias correction counts it.
    optimizer.state.clear()
    if isinstance(optimizer, MuonWithEMA):
        optimizer.rounds = muon_rounds(engine, optimizer)
        optimizer.device = distributed.own_device()
    optimizer.clip = optimizer_config.clip
    optimizer.wrapper = None if engine.optimizer is optimizer else engine.optimizer
    return engine, optimizer
