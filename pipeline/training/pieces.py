"""The optimizer's tensors as pieces of parameters, in every layout.

A rank saves the pieces of parameters and states that it owns, flat, under STATE/PARAMETER. An index
of all files says where in its parameter each piece begins. To load, a rank reads what overlaps the
pieces that it owns now, so no layout (ZeRO stage, precision, number of ranks) is ever converted into
another. A state is `raw` (the fp32 weights), a moment, or an average.
"""

import itertools
import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from models.config import InputError, differences
from models.roles import shape_of
from pipeline import distributed
from pipeline.training.ema import WithEMA

INDEX = "index.json"
RAW = "raw"

GATHERED = 1 << 24
"""Elements of full weights that are gathered at once, 64 MiB, beside the end of one parameter."""

Place = tuple[str, int, int]
"""A file, the first element that it holds of a parameter, and the number of elements."""

Index = dict[str, Any]
"""Places by STATE/PARAMETER, shapes of whole parameters, optimizer's step: of a file, or of all."""


class Piece(NamedTuple):
    """`size` elements of a parameter from `at` on, in the flat `tensor` from `start` on."""

    name: str
    at: int
    tensor: Tensor
    start: int
    size: int

    def of(self, state: Tensor) -> Tensor:
        """The piece of a state that has the shape of `tensor`, as a view."""
        return state.detach().view(-1)[self.start : self.start + self.size]


def masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Each parameter's fp32 master at stage 0, where nothing is partitioned."""
    optimizer = engine.optimizer
    # In bf16, whole fp32 copies lie beside the parameters.
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {p: m for low, high in pairs for p, m in zip(low, high, strict=True)}
    return {p: p for g in optimizer.param_groups for p in g["params"]}


def owned_pieces(engine: Any) -> Iterator[Piece]:
    """This rank's part of every parameter that it owns a part of; at stage 0 the whole of each."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    whole = masters(engine) if stage == 0 else {}
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            yield Piece(name, 0, whole[parameter], 0, parameter.numel())
        elif stage == 3:
            group, start, part = zero.grad_position[zero.get_param_id(parameter)]
            at = part * distributed.rank()
            # The last rank's part may end in padding, whose content is undefined.
            if (size := min(part, parameter.ds_numel - at)) > 0:
                yield Piece(name, at, zero.fp32_partitioned_groups_flat[group], start, size)
        elif (mapping := parameter._hp_mapping) is not None:
            # Stage 1 in bf16 has a class of its own in DeepSpeed.
            flats = getattr(zero, "fp32_groups_flat_partition", None)
            flats = flats or zero.single_partition_of_fp32_groups
            place, at = mapping.hp_fragment_address, mapping.lp_fragment_address.start
            yield Piece(name, at, flats[mapping.param_group_index], place.start, place.numel)


def even_share(pieces: list[Piece], rank: int, ranks: int) -> Iterator[Piece]:
    """One rank's share of what all ranks hold: the pieces, laid end to end, cut equally."""
    total = sum(piece.size for piece in pieces)
    begin, end = total * rank // ranks, total * (rank + 1) // ranks
    # Number of elements before the piece.
    first = 0
    for name, at, tensor, start, size in pieces:
        low, high = max(begin - first, 0), min(end - first, size)
        if low < high:
            yield Piece(name, at + low, tensor, start + low, high - low)
        first += size


def shapes_of(engine: Any) -> dict[str, list[int]]:
    """Shapes of the engine's whole parameters."""
    return {name: list(shape_of(p)) for name, p in engine.module.named_parameters()}


def is_weights(state: str) -> bool:
    """Whether a state holds weights, raw or averaged, and not a moment."""
    return state == RAW or state.startswith("ema")


def collect(
    engine: Any, optimizer: WithEMA, states: Container[str] | None = None
) -> tuple[str, dict[str, Tensor], Index]:
    """This rank's file: name, copies in CPU memory of `states` or all that are in use, and index."""
    file, pieces = f"rank_{distributed.rank():05d}.safetensors", list(owned_pieces(engine))
    if engine.zero_optimization_stage() == 0:
        pieces = even_share(pieces, distributed.rank(), distributed.world_size())
    tensors, places, step = {}, dict[str, list[Place]](), 0
    for piece in pieces:
        found = {RAW: piece.tensor} | optimizer.state[piece.tensor]
        step = max(step, int(found.pop("step", 0)))
        for state, value in found.items():
            # An average that the config no longer names is out of date.
            stale = is_weights(state) and state not in (RAW, *optimizer.decays)
            if stale or (states is not None and state not in states):
                continue
            key = f"{state}/{piece.name}"
            tensors[key] = piece.of(value).to("cpu", copy=True)
            places[key] = [(file, piece.at, piece.size)]
    return file, tensors, {"optimizer_step": step, "shapes": shapes_of(engine), "pieces": places}


def merged(indexes: list[Index]) -> Index:
    """The index of all files, the places of a STATE/PARAMETER in order of their first elements."""
    found: dict[str, list[Place]] = {}
    for index in indexes:
        for key, places in index["pieces"].items():
            found.setdefault(key, []).extend(places)
    return {
        "optimizer_step": max(index["optimizer_step"] for index in indexes),
        "shapes": indexes[0]["shapes"],
        "pieces": {key: sorted(found[key], key=lambda place: place[1]) for key in sorted(found)},
    }


def overlaps(key: str, places: list[Place], first: int, count: int) -> list[Place]:
    """Where elements first to first + count of `key` lie: (file, begin, end) within each file's piece.

    `places` are in order of their first elements. Raises InputError where an element lies in none of them.
    """
    runs, at = [], first
    for file, begin, size in places:
        end = min(begin + size, first + count)
        if begin <= at < end:
            runs.append((file, at - begin, end - begin))
            at = end
    if at != first + count:
        wanted = f"{first} to {first + count - 1}"
        raise InputError(f"{key}: no piece holds element {at}, expected {wanted}")
    return runs


class Pieces:
    """What a folder holds. Files are mapped, and opened only when something in them is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = json.loads((folder / INDEX).read_text())
        self.optimizer_step: int = index["optimizer_step"]
        self.shapes: dict[str, list[int]] = index["shapes"]
        self.places: dict[str, list[Place]] = index["pieces"]
        self.states = sorted({key.partition("/")[0] for key in self.places})
        self._files: dict[str, Any] = {}

    def read(self, key: str, first: int, count: int) -> Tensor:
        """Elements first to first + count of STATE/PARAMETER, flat; InputError if one is missing."""
        parts, named = [], f"{self.folder / INDEX}: {key}"
        for file, begin, end in overlaps(named, self.places.get(key, []), first, count):
            if file not in self._files:
                self._files[file] = safe_open(self.folder / file, "pt")
            parts.append(self._files[file].get_slice(key)[begin:end])
        # A single part stays a view of the mapped file.
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, state: str, name: str) -> Tensor:
        """A state of a whole parameter, in its shape."""
        shape = torch.Size(self.shapes[name])
        return self.read(f"{state}/{name}", 0, shape.numel()).view(shape)


@torch.no_grad()
def load(stored: Pieces, engine: Any, optimizer: WithEMA) -> None:
    """Fill all that this rank owns; raises InputError for another network's. Collective."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    for name, (got, expected) in differences(stored.shapes, shapes_of(engine)).items():
        raise InputError(
            f"{stored.folder}: is of another network: {name} got {got}, expected {expected}. Remedy: the model "
            "section that the run began with."
        )
    if stage == 3:
        # Nothing may stay gathered meanwhile.
        zero.checkpoint_event_prologue()
    for piece in owned_pieces(engine):
        state = optimizer.state[piece.tensor]
        for name in stored.states:
            key, tensor = f"{name}/{piece.name}", piece.tensor
            # Muon and AdamW keep different states.
            if key not in stored.places:
                continue
            if name != RAW:
                tensor = state.setdefault(name, torch.zeros_like(piece.tensor))
            piece.of(tensor).copy_(stored.read(key, piece.at, piece.size))
        if "exp_avg" in state:
            step = torch.tensor(float(stored.optimizer_step), device=piece.tensor.device)
            state.setdefault("step", step)
    if stage == 0:
        for parameter, master in masters(engine).items():
            parameter.copy_(master)
    elif stage == 3:
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
    else:
        zero.update_lp_params()


@torch.no_grad()
def full_weights(
    engine: Any, optimizer: WithEMA, which: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All weights, raw or averaged, on every rank's device. Collective.

    Several parameters are gathered at once, and what is gathered takes the dtype before the next ones are.
    """
    own = {piece.name: piece for piece in owned_pieces(engine)}
    divided = engine.zero_optimization_stage() > 0 and distributed.world_size() > 1
    weights: dict[str, Tensor] = {}
    every = {n: shape_of(p) for n, p in engine.module.named_parameters()}
    ends = itertools.accumulate(shape.numel() for shape in every.values())
    places = zip(every.items(), ends, strict=True)
    for _, some in itertools.groupby(places, lambda place: place[1] // GATHERED):
        shapes = dict(item for item, _ in some)
        sizes = [shape.numel() for shape in shapes.values()]
        values = torch.zeros(sum(sizes), device=engine.device)
        for name, value in zip(shapes, values.split(sizes), strict=True):
            if (piece := own.get(name)) is not None:
                # Before the first step an average is the weights.
                state = optimizer.state[piece.tensor].get(which, piece.tensor)
                value[piece.at : piece.at + piece.size] = piece.of(state)
        if divided:
            # Reduced as integers, every bit arrives, even that of a negative zero.
            dist.all_reduce(values.view(torch.int32))
        flat = values.to(dtype).split(sizes)
        pairs = zip(shapes.items(), flat, strict=True)
        weights |= {name: value.view(shape) for (name, shape), value in pairs}
    return weights
