"""Norms by block of the network: gradient, update, weights, and weights minus their average.

In logged steps, each rank sums over what it owns of the optimizer's tensors, and one small reduction
adds the ranks' sums. Nothing is gathered.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import distributed
from pipeline.training.pieces import owned_pieces

KINDS = ("gradient", "update", "weight", "ema_distance")


def block_of(name: str) -> str:
    """`blocks.3.attn.weight` is in `blocks.3`, `proj_in.weight` in `proj_in`."""
    match = re.match(r"(?:\w+\.)+?\d+(?=\.)", name)
    return match[0] if match else name.split(".")[0]


class BlockNorms:
    """Sums squares by block around a step, as an optimizer's `watch`; `collect` returns roots."""

    def __init__(self, engine: Any, device: torch.device):
        self.divided = engine.zero_optimization_stage() > 0 and distributed.world_size() > 1
        names = [name for name, _ in engine.module.named_parameters()]
        self.blocks = list(dict.fromkeys(map(block_of, names)))
        self.pieces: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for name, _, tensor, start, count in owned_pieces(engine):
            self.pieces[id(tensor)].append((self.blocks.index(block_of(name)), start, count))
        self.sums = torch.zeros(len(KINDS), len(self.blocks), dtype=torch.float64, device=device)

    def _add(self, kind: str, parameter: Tensor, value: Tensor) -> None:
        pieces, flat = self.pieces[id(parameter)], value.detach().flatten()
        if not pieces:
            return
        norms = torch._foreach_norm([flat[start : start + count] for _, start, count in pieces])
        blocks = torch.tensor([block for block, _, _ in pieces], device=self.sums.device)
        squares = torch.stack(norms).to(self.sums).square()
        self.sums[KINDS.index(kind)].index_add_(0, blocks, squares)

    @contextmanager
    def __call__(self, parameters: list[Tensor], state: Any) -> Iterator[None]:
        for parameter in parameters:
            assert parameter.grad is not None
            self._add("gradient", parameter, parameter.grad)
        before = [parameter.detach().clone() for parameter in parameters]
        yield
        for parameter, old in zip(parameters, before, strict=True):
            self._add("update", parameter, parameter - old)
            self._add("weight", parameter, parameter)
            self._add("ema_distance", parameter, parameter - state[parameter]["ema"])

    def collect(self, grad_norm: float | None) -> dict[str, float]:
        """{"weights_by_block/gradient_norm/BLOCK": ...} for the watched step, empty if it was skipped. Collective.

        The optimizer sees the clipped gradient; `grad_norm`, the norm before clipping, scales it back.
        """
        if self.divided:
            dist.all_reduce(self.sums)
        norms = {k: self.sums[i].sqrt().tolist() for i, k in enumerate(KINDS)}
        self.sums.zero_()
        total = {kind: math.hypot(*values) for kind, values in norms.items()}
        if not total["weight"]:
            return {}
        values = {f"norm/{kind}": total[kind] for kind in KINDS[1:]}
        clipped = grad_norm / total["gradient"] if grad_norm and total["gradient"] else 1.0
        for kind in KINDS:
            scale = clipped if kind == "gradient" else 1.0
            for block, norm in zip(self.blocks, norms[kind], strict=True):
                values[f"weights_by_block/{kind}_norm/{block}"] = norm * scale
        return values
