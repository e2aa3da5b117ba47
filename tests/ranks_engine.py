"""Run under torchrun: every ZeRO stage and precision against plain torch on the whole batch; prints a line each.

ranks_engine losses      Muon's losses of 50 steps instead, at every stage in fp32
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from models.conditions import Conditions
from models.dit import DiT
from models.networks import DiTConfig, build_model
from pipeline import distributed
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.ema import WithEMA
from pipeline.training.engine import build_engine, grad_norm, parameter_groups
from pipeline.training.norms import BlockNorms, block_of
from pipeline.training.pieces import full_weights

MODEL = DiTConfig(size="debug", latent_channels=4, text_dim=8, pooled_dim=8)
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.01, clip=0.5)
BATCH, STEPS, DECAY = 8, 5, 0.9


def fresh_model() -> DiT:
    """The same weights every time, none of them zero."""
    torch.manual_seed(0)
    model = build_model(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batches() -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    shapes = [(BATCH, 4, 8, 8), (BATCH, 3, 8), (BATCH, 8), (BATCH, 4, 8, 8)]
    return [
        [torch.rand(BATCH, generator=g), *(torch.randn(s, generator=g) for s in shapes)]
        for _ in range(STEPS)
    ]


def shares(batch: list[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """This rank's micro-batches of a global batch."""
    share = BATCH // distributed.world_size()
    for start in range(distributed.rank() * share, (distributed.rank() + 1) * share, size):
        yield [tensor[start : start + size] for tensor in batch]


Result = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float, dict[str, float]]


def block_norms(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    squares: dict[str, float] = defaultdict(float)
    for name, tensor in tensors.items():
        squares[f"weights_by_block/{kind}_norm/{block_of(name)}"] += float(
            tensor.detach().double().square().sum()
        )
    return {name: value**0.5 for name, value in squares.items()}


def plain_optimizers(model: DiT, kind: str) -> list[torch.optim.Optimizer]:
    """Torch's own: AdamW, and Muon on what it is for."""
    groups = parameter_groups(model, OPTIMIZER.weight_decay, muon=kind == "muon")
    adamw = [g for g in groups if not g["muon"]]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adamw, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    ]
    if kind == "muon":
        matrices = [p for g in groups if g["muon"] for p in g["params"]]
        # q, k, v, out of both attentions and two of the MLP, in 2 blocks.
        assert len(matrices) == 2 * 10
        decay, scale = OPTIMIZER.weight_decay, "match_rms_adamw"
        optimizers.append(
            torch.optim.Muon(matrices, OPTIMIZER.lr, weight_decay=decay, adjust_lr_fn=scale)
        )
    return optimizers


def reference(kind: str) -> Result:
    """Weights, their average, the last gradient's norm and norms by block of plain torch in fp32."""
    model = fresh_model()
    optimizers = plain_optimizers(model, kind)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm, norms = torch.zeros(()), {}
    for t, x_t, text, pooled, target in batches():
        model.zero_grad()
        (model(x_t, t, Conditions(text, pooled=pooled)) - target).square().mean().backward()
        named = dict(model.named_parameters())
        norms = block_norms("gradient", {n: p.grad for n, p in named.items() if p.grad is not None})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        before = {n: p.detach().clone() for n, p in named.items()}
        for optimizer in optimizers:
            optimizer.step()
        for name, p in named.items():
            average[name].lerp_(p.detach(), 1 - DECAY)
        norms |= block_norms("update", {n: p - before[n] for n, p in named.items()})
        norms |= block_norms("weight", named)
        norms |= block_norms("ema_distance", {n: p - average[n] for n, p in named.items()})
    return {n: p.detach() for n, p in model.named_parameters()}, average, float(norm), norms


def engine_of(stage: int, precision: str, kind: str, offload: str) -> tuple[Any, WithEMA]:
    config = EngineConfig(
        zero_stage=stage,  # pyright: ignore[reportArgumentType]
        precision=precision,  # pyright: ignore[reportArgumentType]
        micro_batch=2,
        offload_optimizer="none" if offload == "none" else "cpu",
        offload_parameters="cpu" if offload == "both" else "none",
    )
    settings = OPTIMIZER.model_copy(update={"kind": kind})
    return build_engine(fresh_model(), config, settings, BATCH)


def learn(engine: Any, batch: list[torch.Tensor]) -> float:
    """One step; this rank's mean loss."""
    losses = []
    for t, x_t, text, pooled, target in shares(batch, 2):
        pred = engine(x_t, t, Conditions(text, pooled=pooled))
        loss = (pred.float() - target).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return sum(losses) / len(losses)


def losses_of_muon(stage: int) -> list[float]:
    """The whole batch's loss of 50 steps."""
    engine, optimizer = engine_of(stage, "fp32", "muon", "none")
    losses = []
    for batch in batches() * 10:
        optimizer.prepare(OPTIMIZER.lr, {"ema": DECAY}, None)
        losses.append(learn(engine, batch))
    everyones = distributed.gather_objects(losses)
    return [sum(step) / len(step) for step in zip(*everyones, strict=True)]


def ours(stage: int, precision: str, kind: str, offload: str) -> Result:
    engine, optimizer = engine_of(stage, precision, kind, offload)
    watch = BlockNorms(engine, torch.device("cpu"))
    for number, batch in enumerate(batches()):
        optimizer.prepare(OPTIMIZER.lr, {"ema": DECAY}, watch if number == STEPS - 1 else None)
        learn(engine, batch)
    norm = grad_norm(engine, optimizer)
    assert norm is not None
    norms = {k: v for k, v in watch.collect(norm).items() if "_norm/" in k}
    raw, ema = (full_weights(engine, optimizer, which) for which in ("raw", "ema"))
    return raw, ema, norm, norms


CASES = [
    *(
        (stage, precision, kind, "none")
        for stage in range(4)
        for precision in ("fp32", "bf16")
        for kind in ("adamw", "muon")
    ),
    (1, "fp32", "adamw", "optimizer"),
    (2, "bf16", "adamw", "optimizer"),
    (3, "bf16", "adamw", "both"),
    (2, "fp32", "muon", "optimizer"),
    (3, "bf16", "muon", "both"),
]


def main() -> None:
    distributed.start(60)
    if sys.argv[1:] == ["losses"]:
        for stage in range(4):
            distributed.say(" ".join(map(str, ["losses", stage, *losses_of_muon(stage)])))
        distributed.stop()
        return
    expected = {kind: reference(kind) for kind in ("adamw", "muon")}
    for case in CASES:
        raw, ema, norm, norms = ours(*case)
        if distributed.is_main():
            wanted = expected[case[2]]
            errors = [
                max(float((got[name] - want[name]).abs().max()) for name in want)
                for got, want in ((raw, wanted[0]), (ema, wanted[1]))
            ]
            assert norms.keys() == wanted[3].keys()
            blocks = max(abs(norms[name] / want - 1) for name, want in wanted[3].items())
            print("engine", *case, *errors, abs(norm / wanted[2] - 1), blocks, flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
