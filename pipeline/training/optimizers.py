"""Muon with the averages of the weights, at every ZeRO stage.

Muon's step is a function of whole matrices, and ZeRO cuts them. Momentum is elementwise and lies on the pieces, as
Adam's moments do. A matrix that lies on one rank is stepped on there. Each of the others goes to one rank and its
update back (2502.16982, algorithm 1), in bf16, in which it is orthogonalised anyway: so every stage takes the step of
whole matrices. A rank has one whole matrix at a time.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    DEFAULT_NS_STEPS,
    EPS,
    _adjust_lr,
    _zeropower_via_newtonschulz,
)

from models.roles import parameter_roles, shape_of
from pipeline import distributed
from pipeline.training.ema import WithEMA
from pipeline.training.pieces import owned_pieces

MOMENTUM = 0.95


class Matrix(NamedTuple):
    """Where this rank's part of a matrix lies in its flat tensor, and how many elements each rank holds, in order."""

    shape: torch.Size
    part: slice
    held: list[int]


Round = dict[int, Matrix]
"""Matrices by the rank that orthogonalises each: several that are cut, or one that lies wholly on this rank."""


def rounds_of_cut(matrices: list[Matrix]) -> list[Round]:
    """Deal cut matrices out to ranks that hold a part of them, those of a round being about equally large."""
    queues: dict[int, list[Matrix]] = defaultdict(list)
    for number, matrix in enumerate(sorted(matrices, key=lambda m: -m.shape.numel())):
        holders = [rank for rank, held in enumerate(matrix.held) if held]
        queues[holders[number % len(holders)]].append(matrix)
    length = max(map(len, queues.values()), default=0)
    return [{r: q[k] for r, q in queues.items() if k < len(q)} for k in range(length)]


def muon_rounds(engine: Any, optimizer: torch.optim.Optimizer) -> dict[Tensor, list[Round]]:
    """Muon's matrices by the tensors that this rank's optimizer steps on; ranks have the same rounds of cut ones. Collective."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    roles = parameter_roles(engine.module)
    own = {piece.name: piece for piece in owned_pieces(engine)}
    hidden = {n: p for n, p in engine.module.named_parameters() if roles[n].hidden}
    counts = [own[name].size if name in own else 0 for name in hidden]
    everyones = distributed.gather_objects(counts) if stage else [counts]
    tensors = [p for g in optimizer.param_groups if g["muon"] for p in g["params"]]
    rounds: dict[Tensor, list[Round]] = defaultdict(list)
    cut: dict[Tensor, list[Matrix]] = defaultdict(list)
    for (name, parameter), *held in zip(hidden.items(), *everyones, strict=True):
        piece = own.get(name)
        if stage == 3:
            group = zero.grad_position[zero.get_param_id(parameter)][0]
            tensor = zero.fp32_partitioned_groups_flat[group]
        else:
            # At stages 1 and 2 they are one group, of one tensor.
            tensor = piece.tensor if piece else tensors[0]
        part = slice(piece.start, piece.start + piece.size) if piece else slice(0)
        matrix = Matrix(shape_of(parameter), part, held)
        if sum(map(bool, held)) > 1:
            cut[tensor].append(matrix)
        elif piece:
            rounds[tensor].append({distributed.rank(): matrix})
    return {t: rounds[t] + rounds_of_cut(cut[t]) for t in {**rounds, **cut}}


def exchange(sent: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """A flat tensor to each rank, and one of each rank, of so many elements. Collective."""
    flat = torch.cat(sent)
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [len(part) for part in sent])
    return list(received.split(sizes))


def orthogonalised(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, roughly, by torch's Newton-Schulz steps, in bf16 (Jordan 2024)."""
    coefficients = DEFAULT_A, DEFAULT_B, DEFAULT_C
    return _zeropower_via_newtonschulz(matrix, coefficients, DEFAULT_NS_STEPS, EPS)


def orthogonalised_together(matrices: Round, parts: dict[int, Tensor]) -> dict[int, Tensor]:
    """This rank's parts, flat, of matrices that each go whole to one rank, by that rank. Collective."""
    rank, ranks = distributed.rank(), range(distributed.world_size())
    mine = matrices.get(rank)
    if mine and len(parts[rank]) == mine.shape.numel():
        return {rank: orthogonalised(parts[rank].view(mine.shape)).flatten()}
    nothing = next(iter(parts.values())).new_empty(0)
    sent, sizes = [parts.get(r, nothing) for r in ranks], mine.held if mine else [0 for _ in ranks]
    received = exchange(sent, sizes)
    if mine:
        whole = orthogonalised(torch.cat(received).view(mine.shape))
        received = list(whole.flatten().split(sizes))
    return dict(enumerate(exchange(received, [len(part) for part in sent])))


def muon_flops(shape: torch.Size) -> float:
    """FLOPs of `orthogonalised`: three products a step, of which one is of the Gram matrix with itself."""
    m, n = sorted(shape)
    return DEFAULT_NS_STEPS * (4.0 * m * m * n + 2.0 * m**3)


class MuonAdamW(torch.optim.AdamW):
    """Muon (Jordan 2024) on groups marked `muon`, AdamW on the others, with one state.

    `rounds` and the `device` that computes are set once DeepSpeed has cut the parameters; without them no matrix
    is stepped on. The scale of the step is the one at which AdamW's LR and decay fit (2502.16982, 2.2).
    """

    rounds: dict[Tensor, list[Round]] = {}
    device = torch.device("cpu")

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if not g["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for tensor in group["params"] if group["muon"] else ():
                if tensor.grad is not None and tensor in self.rounds:
                    self._step_on(tensor, group["lr"], group["weight_decay"])
        return loss

    @torch.no_grad()
    def _step_on(self, tensor: Tensor, lr: float, decay: float) -> None:
        assert tensor.grad is not None
        state = self.state[tensor]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        state["momentum_buffer"].lerp_(tensor.grad, 1 - MOMENTUM)
        tensor.mul_(1 - lr * decay)
        flats = (x.view(-1) for x in (tensor, tensor.grad, state["momentum_buffer"]))
        weights, gradient, momentum = flats
        for matrices in self.rounds[tensor]:
            directions: dict[int, Tensor] = {}
            for rank, matrix in matrices.items():
                nesterov = gradient[matrix.part].lerp(momentum[matrix.part], MOMENTUM)
                directions[rank] = nesterov.to(self.device, torch.bfloat16)
            updates = orthogonalised_together(matrices, directions)
            for rank, matrix in matrices.items():
                scaled = _adjust_lr(lr, "match_rms_adamw", matrix.shape)
                weights[matrix.part].add_(updates[rank].to(weights.device), alpha=-scaled)


class AdamWithEMA(WithEMA, torch.optim.AdamW):
    """AdamW and averages of the weights."""


class MuonWithEMA(WithEMA, MuonAdamW):
    """Muon, AdamW and averages of the weights."""


OPTIMIZERS: dict[str, type[WithEMA]] = {"adamw": AdamWithEMA, "muon": MuonWithEMA}
"""By the names of `optimizer.kind`; a state is `step`, or elementwise: flat tensors, which ZeRO cuts, have it."""
