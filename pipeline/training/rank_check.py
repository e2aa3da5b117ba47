"""What all ranks together must show: noise and places of their own, and one pace."""

import hashlib
import sys
from collections import Counter

import numpy as np

from pipeline import distributed
from pipeline.data.batch import Batch

FIRST_STEPS = 10
"""Steps of every attempt that are checked, before it is once per log."""
SLOW, SLOW_STEPS = 1.2, 100
"""A rank that takes so many times the median's seconds in so many steps on end is named."""


def drawn_by(batch: Batch) -> list[tuple[int, str]]:
    """Place in the global batch, and hash of the noise, of each of this rank's samples."""
    assert batch.noise is not None
    rows = zip(batch.indices.tolist(), batch.noise.cpu().numpy(), strict=True)
    return [
        (place, hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest()) for place, row in rows
    ]


def find_fault(drawn: list[list[tuple[int, str]]]) -> str | None:
    """The two ranks that share a place or the noise of a sample, in words; None where none do."""
    for column, what in enumerate(("place in the global batch", "noise")):
        owners: dict[int | str, int] = {}
        for rank, samples in enumerate(drawn):
            for sample in samples:
                if (other := owners.setdefault(sample[column], rank)) != rank:
                    return f"ranks {other} and {rank} have the same {what}, {sample[column]}"
    return None


def check_ranks(batch: Batch) -> None:
    """End the run, by name, where samples of two ranks share their place or noise. Collective."""
    fault = find_fault(distributed.gather_objects(drawn_by(batch)))
    if fault:
        message = (
            f"step {batch.step}: {fault}: they learn the same twice. Remedy: every rank needs the same seed and "
            "a RANK of its own; what changes the random state between steps is to be found."
        )
        sys.exit(message if distributed.is_main() else 1)


class Pace:
    """Seconds of every rank, step by step; names the one that all wait for."""

    def __init__(self, ranks: int):
        self.sums = np.zeros(ranks)
        self.slow = Counter[int]()

    def add(self, seconds: np.ndarray) -> None:
        """Count one step's seconds, (ranks,)."""
        self.sums += seconds
        median = float(np.median(seconds))
        slow = set(np.flatnonzero(seconds > SLOW * median).tolist())
        self.slow = Counter({rank: self.slow[rank] + 1 for rank in slow})
        for rank in slow:
            if self.slow[rank] == SLOW_STEPS:
                distributed.say(
                    f"rank {rank} has taken over {SLOW:g} times the median of all ranks for {SLOW_STEPS} steps, the "
                    f"last {seconds[rank]:.3f} s beside {median:.3f} s: all others wait for it"
                )

    def slowest(self) -> int:
        """The rank with the most seconds since the last call."""
        rank = int(self.sums.argmax())
        self.sums[:] = 0
        return rank
