"""Where a run's time went: the parts add up to the wall time, whatever was killed."""

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.training.ledger import LEDGER, PARTS, Ledger
from pipeline.training.monitor import Monitor
from tests.train_factory import (
    check_as_undisturbed,
    scalars,
    torchrun,
    wait_for,
    workers,
    write_config,
)
from tests.train_factory import train as run_training

OPTIONS = ("training.images=960",)


def attempts(run: Path) -> list[dict[str, float]]:
    return json.loads((run / LEDGER).read_text())["attempts"]


def test_the_parts_of_all_attempts_add_up_and_steps_taken_twice_are_replayed(tmp_path):
    first = Ledger(tmp_path)
    first.mark("start_up")
    for step in range(1, 4):
        time.sleep(0.02)
        first.stepped(step, 0.005 * step)
    first.write()
    # Killed here; what it did since is lost, and the time until the next one begins.
    second = Ledger(tmp_path)
    second.mark("start_up")
    for step in range(2, 6):
        time.sleep(0.02)
        second.stepped(step, 0.0)
    time.sleep(0.03)
    second.mark("save")
    totals = second.totals()
    # Both ledgers are of this process, which began once: the second counts its start anew.
    wall = second.now - first.began
    assert sum(totals.values()) == pytest.approx(wall, abs=1e-6)
    assert 0.04 <= second.spent["replayed"] <= second.spent["productive"] + 0.03
    assert first.spent["data_wait"] == pytest.approx(0.015)
    assert totals["data_wait"] == pytest.approx(0.015)
    assert second.spent["save"] >= 0.03
    assert second.goodput() == pytest.approx(totals["productive"] / wall)
    assert "in 2 attempts: " in second.line()


def test_what_lies_between_a_step_and_a_save_belongs_to_the_step(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.mark("start_up")
    ledger.stepped(1, 0.0)
    holder: Any = SimpleNamespace(ledger=ledger, mark=lambda part: None, since=0.0)
    time.sleep(0.05)  # a log
    with Monitor.paused(holder):
        time.sleep(0.01)
    assert ledger.spent["productive"] >= 0.05
    assert 0.01 <= ledger.spent["save"] < 0.05


@pytest.mark.distributed
def test_a_run_says_where_its_time_went(tmp_path):
    told = run_training(write_config(tmp_path), "training.images=64")
    (attempt,) = attempts(tmp_path / "run")
    assert set(PARTS) < set(attempt)
    assert attempt["step"] == 8
    assert attempt["productive"] > 0
    assert attempt["start_up"] > attempt["replayed"] == 0
    assert "h in 1 attempt: " in told
    assert 0 < scalars(tmp_path / "run", "speed/goodput")[-1][1] < 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seed", [0])
def test_ten_random_kills_of_ranks_and_launcher_leave_a_ledger_that_adds_up(tmp_path, seed):
    """No person does anything: the launcher starts ranks again, and a scheduler would the launcher."""
    rng, config = random.Random(seed), write_config(tmp_path)
    run, begun, kills = tmp_path / "run", time.time(), 0
    while True:
        process = torchrun("pipeline.train", str(config), *OPTIONS, ranks=2)
        step = len(scalars(run, "loss/train")) if (run / "tensorboard").is_dir() else 0
        # A loaded machine may be many steps ahead of what it has said.
        if kills < 10 and step < 100:
            wait_for(process, f"step {step + rng.randrange(1, 8)}/")
            kills += 1
            victims = [process.pid] if rng.random() < 0.5 else workers(process)
            os.kill(rng.choice(victims), signal.SIGKILL)
        status = process.wait()
        told = [line for line in process.stdout or () if " attempts: " in line]
        if status == 0:
            break
        assert kills <= 10
    found = attempts(run)
    parts = sum(attempt[part] for attempt in found for part in PARTS)
    between = [
        later["began"] - earlier["began"] - sum(earlier[part] for part in PARTS)
        for earlier, later in itertools.pairwise(found)
    ]
    assert len(found) == kills + 1 > 5
    assert all(seconds >= 0 for seconds in between)
    last = found[-1]["began"] + sum(found[-1][part] for part in PARTS)
    assert parts + sum(between) == pytest.approx(last - found[0]["began"], abs=1e-3)
    assert found[0]["began"] >= begun - 1
    assert last <= time.time()
    assert sum(attempt["replayed"] for attempt in found) > 0
    print(f"{kills} kills: {told[-1]}")
    check_as_undisturbed(run, *OPTIONS, step=120)
