"""Two writers of one folder: who waits, who goes on, who is refused; and restarts, which never need a person."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.output import StoreLock
from data_prep.storage import open_root
from models import lock
from models.config import InputError
from models.lock import Lock
from tests import prep_factory, train_factory
from tests.forked import free_port, wait_until

BEAT_S = 0.05


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", BEAT_S)
    for name in lock.JOBS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lively(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that do not stop on a busy machine."""
    monkeypatch.setattr(lock, "BEAT_S", 1.0)


def owner(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def left_over(path: Path, **facts: Any) -> None:
    """What another process left in the file."""
    with Lock(path, "run", print):
        path.write_text(json.dumps(owner(path) | {"token": "its own"} | facts))


ELSEWHERE = {"host": "another-host", "pid": 4711, "started": "1"}
# What the file says of the other process, this process's variables, and whether it is followed at once.
OTHERS = [
    ({"host": "another-host"}, {}, False),
    # A container's process 1 is not that of another, nor of the same host's earlier life.
    ({"space": "another-boot pid:[1]", "pid": 1}, {}, False),
    ({"space": "", "pid": 2**22 + 1}, {}, False),
    ({"pid": 2**22 + 1}, {}, True),
    # The id of a process that has ended, which another one has got.
    ({"started": "1"}, {}, True),
    *((ELSEWHERE | {"job": {name: "7"}}, {name: "7"}, True) for name in lock.JOBS),
    *((ELSEWHERE | {"job": {name: "7"}}, {name: "8"}, False) for name in lock.JOBS),
    (ELSEWHERE | {"job": {"SLURM_JOB_ID": "7"}}, {"PBS_JOBID": "7"}, False),
    (ELSEWHERE | {"job": {}}, {"TORCHELASTIC_RUN_ID": "none"}, False),
]


@pytest.mark.parametrize(("facts", "variables", "at_once"), OTHERS)
def test_a_silent_process_is_followed_at_once_or_after_three_heartbeats(
    tmp_path, monkeypatch, facts, variables, at_once
):
    path, said = tmp_path / "lock.json", list[str]()
    left_over(path, **facts)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    with Lock(path, "run", said.append) as mine:
        waited = time.monotonic() - begin
        mine.check()
        assert owner(path)["token"] != "its own"
    assert (waited > 3 * BEAT_S) is not at_once
    assert [line.split(": ")[2].split()[0] for line in said] == ["may"] * (not at_once) + ["goes"]
    assert str(facts.get("pid", os.getpid())) in said[-1]
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "null", "{}", '{"token": 1}', "\0\0"])
def test_a_file_that_says_nothing_of_its_writer_is_waited_for_and_followed(tmp_path, text):
    path, said = tmp_path / "lock.json", list[str]()
    path.write_text(text)
    with Lock(path, "run", said.append) as mine:
        mine.check()
    assert "an unknown process" in said[0]


def test_one_whose_heartbeat_moves_is_named_and_stays(tmp_path, lively):
    path = tmp_path / "lock.json"
    with Lock(path, "output", print) as first:
        with pytest.raises(InputError, match=rf"^output: {tmp_path}: process {os.getpid()} on .*"):
            Lock(path, "output", print).__enter__()
        first.check()
        assert not first.lost
    assert not path.exists()


def test_one_that_ends_while_it_is_watched_is_followed(tmp_path):
    path = tmp_path / "lock.json"
    first = Lock(path, "run", print).__enter__()
    threading.Timer(BEAT_S / 2, first.__exit__).start()
    with Lock(path, "run", print) as second:
        second.check()


def test_a_holder_that_was_succeeded_finds_out_and_leaves_the_others_file(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with Lock(path, "run", print) as first:
        elsewhere = pickle.loads(pickle.dumps(first))
        elsewhere.check()
        with Lock(path, "run", print) as second:
            for holder in (first, elsewhere):
                with pytest.raises(InputError, match=r"taken over by process .* without writing"):
                    holder.check()
            wait_until(lambda: first.lost, 10)
            first.__exit__()
            second.check()
            assert not second.lost


def test_of_many_that_begin_at_once_one_stays(tmp_path, lively):
    path, stay = tmp_path / "lock.json", list[Lock]()
    left_over(path, pid=2**22 + 1)

    def begin() -> None:
        holder = Lock(path, "run", print)
        try:
            stay.append(holder.__enter__())
        except InputError:
            return

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = stay
    winner.check()
    winner.__exit__()


def test_on_a_store_one_of_two_is_refused_and_a_silent_one_followed(bucket, lively):
    path, said = open_root(f"{bucket}/dataset", "output") / "lock.json", list[str]()
    with StoreLock(path, "output", said.append) as first:
        with pytest.raises(InputError, match="is writing there"):
            StoreLock(path, "output", said.append).__enter__()
        first.check()
        text = path.read_text()
    assert not path.exists()
    path.write_text(text.replace('"pid"', '"id"'))
    with StoreLock(path, "output", said.append) as mine:
        mine.check()
    assert "goes on in the place of an unknown process" in said[-1]


def test_on_a_store_that_cannot_put_if_absent_a_warning_says_so(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    put = MemoryFileSystem.pipe_file
    careless = lambda self, path, value, mode="", **more: put(self, path, value, **more)  # noqa: E731
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", careless)
    path, said = open_root("memory://dataset", "output") / "lock.json", list[str]()
    with StoreLock(path, "output", said.append) as mine:
        mine.check()
    assert "cannot tell whether another process writes there" in said[0]


def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(InputError, match=r"^run: cannot write /proc/nothing: "):
        Lock(Path("/proc/nothing/lock.json"), "run", print).__enter__()


# --- as real processes


def elsewhere(command: list[str], host: str, **variables: str) -> subprocess.Popen[str]:
    """A command on a host of another name."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    rename = ["unshare", "--uts", *user, "sh", "-c", 'hostname "$0" && exec "$@"', host]
    return subprocess.Popen(
        [*rename, *command],
        env=train_factory.environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("job", ["7", ""])
def test_all_ranks_killed_and_started_again_on_another_host_it_goes_on_without_a_person(
    tmp_path, job
):
    if subprocess.run(["unshare", "--uts", "true"]).returncode:
        pytest.skip("no host names of their own here")
    config, job = train_factory.write_config(tmp_path), {"SLURM_JOB_ID": job} if job else {}
    launcher = "torch.distributed.run --nproc-per-node 2 --master-addr 127.0.0.1 --master-port"
    launcher = ["-m", *launcher.split(), str(free_port())]
    # Long, so that no rank has ended by itself when it is killed on a busy machine.
    long = "training.images=1920"
    command = [sys.executable, *launcher, "-m", "pipeline.train", str(config), long]
    first = elsewhere(command, "one", **job)
    train_factory.wait_for(first, "step_00000006, for which")
    for pid in [first.pid, *train_factory.workers(first)]:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    second = elsewhere(command, "two", **job)
    output, _ = second.communicate()
    assert second.returncode == 0, output
    assert ("looking for its heartbeat" in output) is not bool(job)
    assert re.search("goes on in the place of process [0-9]+ on one", output)
    assert "resuming at step" in output
    train_factory.check_as_undisturbed(tmp_path / "run", long, step=240)
    assert not (tmp_path / "run" / "lock.json").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_second_training_of_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    config = str(train_factory.write_config(tmp_path))
    first = train_factory.start("pipeline.train", config, "training.images=800000")
    train_factory.wait_for(first, "step 3/")
    second = train_factory.run("pipeline.train", config, "training.images=800000", ranks=2)
    assert second.returncode != 0
    # Both ranks say so.
    assert second.stderr.count(f"process {first.pid} on ") == 2
    assert "Traceback" not in second.stderr
    # Another host has taken the folder over.
    path = tmp_path / "run" / "lock.json"
    path.write_text(json.dumps(owner(path) | ELSEWHERE | {"token": "its own"}))
    assert "taken over by process 4711 on another-host" in first.stdout.read()
    assert first.wait() == 2
    assert owner(path)["pid"] == 4711


@pytest.mark.slow
@pytest.mark.distributed
def test_a_second_preparation_of_an_output_is_refused_and_the_first_goes_on(
    tmp_path, vae_folder, text_folder
):
    config = prep_factory.config_of_pictures(tmp_path, 2000, vae_folder, text_folder)
    command = [sys.executable, "-m", "data_prep.prepare", str(config)]
    first = elsewhere(command, "one")
    wait_until(lambda: (tmp_path / "dataset" / "work" / "config.json").exists(), 120)
    second = elsewhere(command, "two")
    output, _ = second.communicate()
    assert second.returncode == 2, output
    assert re.search("process [0-9]+ on one is writing there", output)
    assert "Traceback" not in output
    output, _ = first.communicate()
    assert first.returncode == 0, output
