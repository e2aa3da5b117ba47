"""What all ranks together must show: noise and places of their own, and one pace."""

import hashlib
import sys

import numpy as np

from pipeline import distributed
from pipeline.data.batch import Batch

FIRST_STEPS = 10
"""Steps of every attempt that are checked, before it is once per log."""
SLOW, SLOW_STEPS = 1.2, 100
"""A rank that takes so many times the median's seconds in so many steps on end is named."""


def find_fault(drawn: list[list[tuple[int, str]]]) -> str | None:
    """The two ranks that share a place or the noise of a sample, in words; None where none do.

    `drawn` has place in the global batch and hash of the noise of each sample, by rank.
    """
    for column, what in enumerate(("place in the global batch", "noise")):
        owners: dict[int | str, int] = {}
        for rank, samples in enumerate(drawn):
            for sample in samples:
                if (other := owners.setdefault(sample[column], rank)) != rank:
                    return f"ranks {other} and {rank} have the same {what}, {sample[column]}"
    return None


def check_ranks(batch: Batch) -> None:
    """End the run, by name, where samples of two ranks share their place or noise. Collective."""
    assert batch.noise is not None
    hashes = [hashlib.blake2b(row, digest_size=8).hexdigest() for row in batch.noise.cpu().numpy()]
    drawn = list(zip(batch.indices.tolist(), hashes, strict=True))
    if fault := find_fault(distributed.gather_objects(drawn)):
        message = (
            f"step {batch.step}: {fault}: they learn the same twice. Remedy: every rank needs the same seed and "
            "a RANK of its own; what changes the random state between steps is to be found."
        )
        sys.exit(message if distributed.is_main() else 1)


class Pace:
    """Seconds of every rank, step by step; names the one that all wait for."""

    def __init__(self, ranks: int):
        self.sums = np.zeros(ranks)
        self.slow = np.zeros(ranks, int)
        """Slow steps of every rank on end."""

    def add(self, seconds: np.ndarray) -> None:
        """Count one step's seconds, (ranks,)."""
        self.sums += seconds
        median = float(np.median(seconds))
        self.slow = np.where(seconds > SLOW * median, self.slow + 1, 0)
        for rank in np.flatnonzero(self.slow == SLOW_STEPS):
            distributed.say(
                f"rank {rank} has taken over {SLOW:g} times the median of all ranks for {SLOW_STEPS} steps, the "
                f"last {seconds[rank]:.3f} s beside {median:.3f} s: all others wait for it"
            )

    def slowest(self) -> int:
        """The rank with the most seconds since the last call."""
        rank = int(self.sums.argmax())
        self.sums[:] = 0
        return rank
