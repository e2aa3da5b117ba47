"""Work whose workers die: every item is answered once or handed back, and each death has its item to blame."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    WorkerCrashedError,
)

from data_prep import workers
from data_prep.config import RayConfig
from data_prep.workers import ATTEMPTS, LOST, Actors, Shares, Tasks, Worker, num_cpus, share_out
from models.config import InputError
from tests.forked import alive, wait_until
from tests.prep_factory import config_of_pictures


def note(folder: Path, *facts: object) -> None:
    with (folder / "notes").open("a") as file:
        file.write(" ".join(map(str, facts)) + "\n")


def notes(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "notes").read_text().splitlines()]


def double(folder: Path, number: int, deadly: int) -> int:
    """Twice the number; the deadly one kills whoever works on it."""
    note(folder, number, os.getpid())
    if number == deadly:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


class Doubler(Worker):
    def __init__(self, settings: object, num_decoders: int):
        pass

    double = staticmethod(double)


class Stillborn(Doubler):
    def describe(self) -> None:
        os._exit(1)


class GpuHolder(Worker):
    """Notes which GPU it saw when it began and at each call; the work in the list kills it, once."""

    def __init__(self, folder: Path, num_decoders: int):
        self.folder = folder

    def describe(self) -> None:
        self.gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        others = {int(pid) for _, pid, gpu in notes(self.folder) if gpu == self.gpu}
        shared = any(alive(pid) for pid in others)
        note(self.folder, "shared" if shared else "begun", os.getpid(), self.gpu)

    def hold(self, number: int) -> None:
        same = os.environ["CUDA_VISIBLE_DEVICES"] == self.gpu
        note(self.folder, "held" if same else "changed", os.getpid(), self.gpu)
        if number in (3, 17, 30) and not (self.folder / str(number)).exists():
            (self.folder / str(number)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)


def hold_gpus(folder: Path) -> None:
    """40 shards on four GPUs in which Ray believes, with a lull in which Ray ends idle workers."""
    ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False)
    actors = Actors(GpuHolder, folder, share_out(RayConfig(), threads=1, most=40), print)
    all_have_begun(actors)
    done = actors.run("hold", ([(number,)] for number in range(40)))
    assert len(list(islice(done, 20))) == 20
    time.sleep(5)
    assert len(list(done)) == 20
    all_have_begun(actors)
    assert len(list(actors.run("hold", [[(number,)] for number in range(8)]))) == 8


def all_have_begun(actors: Actors) -> None:
    while actors._beginning:
        actors._wait({})


@pytest.fixture
def two_actors(ray_address):
    with Actors(Doubler, None, Shares(2, 1, 0, 1), print) as actors:
        yield actors


def groups(folder: Path, size: int, deadly: int) -> list[list[tuple]]:
    return [[(folder, n, deadly) for n in range(i, i + size)] for i in range(0, 24, size)]


@pytest.mark.parametrize(("kind", "size"), [("tasks", 8), ("actors", 1), ("actors", 8)])
def test_an_item_that_kills_its_workers_is_handed_back_and_those_beside_it_answered(
    tmp_path, two_actors, kind, size, capsys
):
    work = groups(tmp_path, size, 13)
    tasks = Tasks("_double", print)
    answers = tasks.run(double, work) if kind == "tasks" else two_actors.run("double", work)
    found = list(answers)
    numbers = {number: answer for (_, number, _), answer in found}
    assert len(found) == len(numbers) == 24
    assert numbers.pop(13) is LOST
    assert all(answer == 2 * number for number, answer in numbers.items())
    tried = Counter(int(number) for number, _ in notes(tmp_path))
    # An answer may be on its way when its worker dies; the item is then done once more.
    assert ATTEMPTS <= tried.pop(13) <= ATTEMPTS + 1
    assert max(tried.values()) <= 2
    said = capsys.readouterr().out.splitlines()
    assert ATTEMPTS <= said.count("a worker died; its work is tried again") <= ATTEMPTS + 1


def add_up(parts: list[int], deadly: set[int], left_out: list[int] | tuple[()] = ()) -> int:
    """The sum of the parts; the deadly ones kill."""
    rest = [part for place, part in enumerate(parts) if place not in left_out]
    if deadly & set(rest):
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(rest)


def try_part(parts: list[int], deadly: set[int], place: int) -> None:
    add_up([parts[place]], deadly)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))]
)
def test_of_items_that_kill_their_workers_the_deadly_parts_alone_are_left_out(
    ray_address, monkeypatch, seed
):
    # With one death as proof, what was in the same worker would be blamed as well.
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    rng = random.Random(seed)
    items = [[*range(10 * i, 10 * i + rng.choice([2, 3, 6]))] for i in range(1 + seed)]
    deadly = {rng.choice(parts) for parts in items[:2]}
    groups = [[(parts, deadly) for parts in items]]
    found = Tasks("_add", print).run_all(add_up, try_part, groups, lambda item: len(item[0]))
    answers = {parts[0]: answer for (parts, _), answer in found}
    assert answers == {parts[0]: sum(set(parts) - deadly) for parts in items}


@pytest.mark.parametrize(
    ("error", "weight"),
    [
        (WorkerCrashedError(), 1.0),
        (ActorDiedError(), 1.0),
        (OutOfMemoryError("full"), 0.25),
        (NodeDiedError("gone"), 0.25),
        (ObjectLostError("0" * 56, None, ""), 0.25),
        (ActorUnavailableError("no answer", None), 0.25),
    ],
)
def test_a_loss_with_another_cause_than_the_work_weighs_less_and_many_in_a_row_end_it(
    ray_address, monkeypatch, error, weight
):
    monkeypatch.setattr(workers, "MEMORY_WAIT_S", 0.0)
    tasks = Tasks("_double", print)
    for _ in range(workers.PATIENCE * num_cpus()):
        assert tasks._weigh(error) == weight
    with pytest.raises(InputError, match=f"by {type(error).__name__}. Remedy: "):
        tasks._weigh(error)


FULL = """
import sys
from data_prep import prepare, workers
from models.command import run_command
workers.MEMORY_WAIT_S = 0.1
run_command(prepare.main)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_where_ray_ends_every_worker_for_want_of_memory_one_message_says_so(
    tmp_path, vae_folder, text_folder
):
    config = config_of_pictures(tmp_path, 4, vae_folder, text_folder)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(config), "ray.num_cpus=1"],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        | {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "50"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "13 workers in a row were lost" in done.stderr
    assert "OutOfMemoryError. Remedy: " in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    full = "the memory of a node is full, for which Ray ended a worker; its work is tried again"
    assert lines.count(full) == 13
    assert "raylet" not in done.stdout + done.stderr


@pytest.mark.parametrize("weight_gib", [0.5, 1, 3, 20, 1000])
def test_by_default_no_more_actors_begin_than_memory_holds(ray_address, weight_gib):
    weight, (node,) = int(weight_gib * 2**30), ray.nodes()
    room = int(node["Resources"]["memory"] // weight)
    shares = share_out(RayConfig(), threads=1, most=99, weight=weight)
    assert shares.num_actors == max(min(num_cpus(), room), 1)
    assert shares.memory == (weight if room else 0)
    assert share_out(RayConfig(num_actors=3), 1, 99, weight).num_actors == 3


@pytest.mark.slow
@pytest.mark.distributed
def test_an_encoder_keeps_the_gpu_that_it_began_with_and_shares_it_with_no_living_one(tmp_path):
    (tmp_path / "notes").touch()
    code = "import sys, pathlib; from tests.test_workers import *; hold_gpus(pathlib.Path(sys.argv[1]))"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = Counter(kind for kind, _, _ in notes(tmp_path))
    assert kinds.keys() == {"begun", "held"}
    assert kinds["begun"] >= 4 + 3
    assert {gpu for _, _, gpu in notes(tmp_path)} == set("0123")


def test_actors_that_die_before_they_have_begun_end_the_work(ray_address, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 1)
    wrong = pytest.raises(InputError, match="2 workers in a row were lost before they had done")
    with Actors(Stillborn, None, Shares(1, 1, 0, 1), print) as actors, wrong:
        actors.describe()


@pytest.mark.slow
def test_actors_without_a_place_are_waited_for_aloud(ray_address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray_address)  # of a cluster, which may grow
    monkeypatch.setattr(workers, "SAY_EVERY_S", 0.0)
    said = list[str]()
    shares = share_out(RayConfig(num_actors=1, gpus_per_actor=3), threads=1, most=1)
    with Actors(Doubler, None, shares, said.append) as actors:
        actors._wait({})
    assert said[0].startswith(
        "1 of 1 actors load their encoders, or wait for a place: each takes 1 CPUs and"
    )
    assert "3 GPUs; the cluster has 1 nodes, free are" in said[0]
    assert "0 of 0 GPUs" in said[0]


def test_an_actor_that_finds_no_room_keeps_no_work_from_the_others(ray_address, tmp_path):
    tenant = ray.remote(num_cpus=3)(Doubler).remote(None, 1)
    ray.get(tenant.__ray_ready__.remote())
    # Of the four CPUs one is left, for one of the two.
    with Actors(Doubler, None, Shares(2, 1, 0, 1), print) as actors:
        work = groups(tmp_path, 1, deadly=-1)
        done = threading.Thread(target=lambda: list(actors.run("double", work)), daemon=True)
        done.start()
        done.join(timeout=120)
        assert not done.is_alive(), "work waits for an actor that cannot begin"
        assert len(actors._beginning) == 1
    ray.kill(tenant)


def test_actors_end_with_the_block_that_they_work_in(ray_address, tmp_path):
    with Actors(Doubler, None, Shares(1, 1, 0, 1), print) as actors:
        assert [answer for _, answer in actors.run("double", [[(tmp_path, 3, -1)]])] == [6]
        ((_, pid),) = notes(tmp_path)
        assert alive(int(pid))
    wait_until(lambda: not alive(int(pid)), 60)
