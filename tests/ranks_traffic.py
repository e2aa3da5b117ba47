"""Run under torchrun: what each layout hands to torch.distributed in a step; prints a line of JSON each."""

import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.conditions import Conditions
from models.networks import DiTConfig, build_model
from pipeline import distributed
from pipeline.training import engine as engine_module
from pipeline.training.config import EngineConfig
from pipeline.training.engine import build_engine
from tests.ranks_engine import BATCH, DECAY, OPTIMIZER, batches, shares

# Some of its matrices are so large that ZeRO 3 does not leave them whole.
MODEL = DiTConfig(size="debug", hidden_size=192, latent_channels=4, text_dim=8, pooled_dim=8)

NAMES = {
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "alltoall_base_": "all_to_all",
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Traffic(TorchDispatchMode):
    """Elements by kind of collective and dtype, as its input on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func.overloadpacket.__name__
            # All but all_reduce have an output first.
            given = args[0] if kind == "allreduce_" else args[1]
            tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
            for tensor in tensors:
                if tensor.numel() > 2:
                    self.seen[NAMES[kind], DTYPES[tensor.dtype]] += tensor.numel()
        return func(*args, **(kwargs or {}))


def traffic(settings: dict[str, Any]) -> tuple[dict[str, float], bool]:
    """Elements in the third step, the mean of the ranks, and whether some were sent before backward had ended.

    Scalars that ranks agree on are left out.
    """
    settings = dict(settings)
    model = MODEL.model_copy(
        update={"gradient_checkpointing": settings.pop("checkpointing", False)}
    )
    engine_module.LIVE_ELEMENTS = settings.pop("live", 10**9)
    engine_module.BUCKET_ELEMENTS = settings.pop("bucket", 10**9)
    optimizer_config = OPTIMIZER.model_copy(update={"kind": settings.pop("kind", "adamw")})
    config = EngineConfig.model_validate(settings)
    engine, optimizer = build_engine(build_model(model), config, optimizer_config, BATCH)
    seen, early = Traffic(), list[bool]()
    # The first layer's gradient is the last.
    first = engine.module.proj_in.weight
    first.register_post_accumulate_grad_hook(lambda _: early.append(bool(seen.seen)))
    for batch in batches()[:3]:
        seen.seen.clear()  # the first step also allocates, and learns the order of parameters
        optimizer.prepare(OPTIMIZER.lr, {"ema": DECAY}, None)
        with seen:
            for t, x_t, text, pooled, target in shares(batch, config.micro_batch or BATCH):
                pred = engine(x_t, t, Conditions(text, pooled=pooled))
                engine.backward((pred.float() - target).square().mean())
                engine.step()
    everyones = distributed.gather_objects(seen.seen)
    total = sum(everyones, Counter())
    means = {f"{kind} {dtype}": n / len(everyones) for (kind, dtype), n in sorted(total.items())}
    return means, early[-1]


def main() -> None:
    distributed.start(60)
    for settings in json.loads(sys.argv[1]):
        found = traffic(settings)
        distributed.say("traffic " + json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main()
