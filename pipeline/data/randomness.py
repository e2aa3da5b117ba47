"""All random draws: each a pure function of its seed, its purpose and its counters.

No global generator carries state, so a resumed run draws what an undisturbed one would have drawn.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def make_generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A counter-based generator keyed by 128 hashed bits, the same on every machine.

    torch's CPU generator keeps 32 bits of its seed only, with which a long run would repeat noise.
    """
    text = "/".join(str(part) for part in (seed, purpose, *counters))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def draw_noise(
    seed: int,
    step: int,
    indices: Iterable[int] | Tensor,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    purpose: str = "noise",
) -> Float[Tensor, "n ..."]:
    """Standard normal fp32; row i is a pure function of (seed, purpose, step, indices[i]).

    `indices` count within the global batch. Drawn on the CPU, so that a GPU sees the same noise.
    """
    rows = [int(i) for i in indices]
    noise = torch.empty(len(rows), *shape)
    fill_noise(noise, seed, step, rows, purpose)
    return noise.to(device)


def fill_noise(noise: Tensor, seed: int, step: int, indices: list[int], purpose: str) -> None:
    """Overwrite an fp32 tensor in CPU memory with what `draw_noise` draws."""
    for row, index in zip(noise.numpy(), indices, strict=True):
        make_generator(seed, purpose, step, index).standard_normal(dtype=np.float32, out=row)


def draw_dropout(seed: int, step: int, batch_size: int, p: float) -> Bool[Tensor, " B"]:
    """Whether each sample of the global batch loses its caption, with probability `p`."""
    return torch.from_numpy(make_generator(seed, "dropout", step).random(batch_size) < p)
