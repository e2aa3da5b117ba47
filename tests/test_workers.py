"""Work whose workers die: every item is answered once or handed back, and each death has its item to blame."""

import os
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

from data_prep import workers
from data_prep.config import RayConfig
from data_prep.workers import ATTEMPTS, LOST, Actors, Shares, Tasks, Worker, share_out
from tests.forked import alive, wait_until


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
    tmp_path, two_actors, kind, size
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
    wrong = pytest.raises(RuntimeError, match="2 encoders in a row died before they had done")
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
    assert said[0].startswith("waiting for 1 of 1 actors to begin, each of which wants 1 CPUs and")
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
