"""Ranks that learn the same twice, or that all others wait for, are named."""

import numpy as np
import pytest
import torch

from pipeline.data.randomness import draw_noise
from pipeline.training.rank_check import SLOW_STEPS, Pace, find_fault
from tests import train_factory
from tests.train_factory import scalars, write_config

SHAPE = (4, 2, 2)


def drawn(
    ranks: int, each: int, seed_of=lambda rank: 0, place_of=lambda rank, i, each: rank * each + i
):
    """What each simulated rank would show of its samples, noise drawn by seed and place."""
    found = []
    for rank in range(ranks):
        places = torch.tensor([place_of(rank, i, each) for i in range(each)])
        noise = draw_noise(seed_of(rank), 3, places, SHAPE, torch.device("cpu"), "noise")
        found.append(
            [(int(p), row.numpy().tobytes().hex()) for p, row in zip(places, noise, strict=True)]
        )
    return found


@pytest.mark.parametrize(("ranks", "each"), [(1, 8), (2, 4), (64, 3), (64, 1)])
def test_ranks_with_places_and_noise_of_their_own_raise_no_alarm(ranks, each):
    assert find_fault(drawn(ranks, each)) is None


def test_one_place_on_every_rank_and_noise_drawn_twice_are_found():
    same_place = drawn(4, 2, place_of=lambda rank, i, each: i)
    assert find_fault(same_place) == "ranks 0 and 1 have the same place in the global batch, 0"
    # One generator on every rank, seeded alike, in place of a function of the place.
    generator = [torch.Generator().manual_seed(0) for _ in range(3)]
    alike = [
        [
            (2 * rank + i, torch.randn(SHAPE, generator=generator[rank]).numpy().tobytes().hex())
            for i in range(2)
        ]
        for rank in range(3)
    ]
    assert "ranks 0 and 1 have the same noise" in (find_fault(alike) or "")
    # Seed + rank, which a resume on more ranks makes meet: rank 1 of then is what rank 0 of seed 1 drew.
    met = drawn(2, 2, seed_of=lambda rank: 5, place_of=lambda rank, i, each: 7 + i)
    assert find_fault(met) is not None


def test_a_rank_is_named_once_it_has_been_slow_for_long(capsys):
    pace = Pace(5)
    for step in range(SLOW_STEPS + 20):
        seconds = np.array([1.0, 1.05, 1.3 if step % 50 else 1.0, 1.3, 1.0])
        pace.add(seconds)
    told = capsys.readouterr().out
    assert told.count("rank 3 has taken over 1.2 times") == 1
    assert "rank 2" not in told
    assert pace.slowest() == 3


FAULTY = """
import runpy
from pipeline.data import batch, randomness
fill = randomness.fill_noise
def faulty(noise, seed, step, rows, *purpose):
    return fill(noise, seed, step, list(range(len(rows))), *purpose)
batch.fill_noise = randomness.fill_noise = faulty
runpy.run_module("pipeline.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.distributed
def test_a_run_whose_ranks_draw_alike_ends_by_name_before_it_learns(tmp_path):
    done = train_factory.run("-c", FAULTY, str(write_config(tmp_path)), ranks=2)
    assert done.returncode == 1
    assert "ranks 0 and 1 have the same noise" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.distributed
def test_two_ranks_train_unalarmed_and_the_slowest_is_shown(tmp_path):
    train_factory.train(
        write_config(tmp_path), "training.images=96", "engine.micro_batch=2", ranks=2
    )
    assert {value for _, value in scalars(tmp_path / "run", "speed/slowest_rank")} <= {0.0, 1.0}
