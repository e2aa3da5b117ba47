"""Two network namespaces as two hosts: no shared loopback, and a cable that is cut for a while."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.audit import verify
from data_prep.schema import read_manifest
from pipeline.training.checkpoint import candidates
from tests import prep_factory, train_factory
from tests.forked import wait_until
from tests.hosts import ADDRESSES, NAMES, Hosts, two_hosts
from tests.ray_cluster import BIN, RAY

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
END_S = 300  # by then a torchrun without its other half has ended, or hangs


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts([], []) as made:
        yield made


def train(hosts: Hosts, config: Path, *overrides: str) -> list:
    """torchrun on both hosts, one rank each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
               "--rdzv-backend=c10d", f"--rdzv-endpoint={NAMES[0]}:29400", "--rdzv-id=test",
               "-m", "pipeline.train", str(config), *overrides]  # fmt: skip
    env = train_factory.environment()
    return [hosts.start(host, command, env=env, cwd=ROOT) for host in (0, 1)]


def ranks_of(host: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that torchrun started on a host, as `python -u -m pipeline.train`."""
    found = []
    for process in psutil.Process(host.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process.pid] if "-u" in process.cmdline() else []
    return found


def test_training_outlives_a_short_cut_and_a_long_one_ends_it_so_that_it_resumes(hosts, tmp_path):
    config = train_factory.write_config(tmp_path)
    options = ["engine.zero_stage=2", "engine.timeout_s=40", "engine.heartbeat_timeout_s=30"]
    options += ["training.images=1200"]
    first, second = train(hosts, config, *options)
    train_factory.wait_for(first, "step 2/")
    hosts.cut()
    time.sleep(5)
    hosts.mend()
    train_factory.wait_for(first, "step 14/")  # TCP sent again what was lost
    hosts.cut()
    try:
        output = first.communicate(timeout=END_S)[0]
        wait_until(lambda: not ranks_of(second), END_S, "a rank that was cut off hangs")
    finally:
        hosts.mend()
    # The other's torchrun waits for the store that is beyond the cut.
    other = second.communicate(timeout=END_S)[0]
    assert 0 not in (first.returncode, second.returncode)
    told = "no step in 40 s|does not answer|no answer for|is gone|Timed out|Connection"
    for text in (output, other):
        assert re.search(told, text), text
    step = int(candidates(tmp_path / "run")[0].name.removeprefix("step_"))

    again = [p.communicate()[0] for p in train(hosts, config, *options)]
    assert f"resuming at step {step} of 150" in again[0], again
    train_factory.check_as_undisturbed(tmp_path / "run", *options, step=150)


def test_a_preparation_goes_on_without_a_host_that_was_cut_off(
    hosts, tmp_path, vae_folder, text_folder
):
    config = prep_factory.config_of_pictures(tmp_path, 120, vae_folder, text_folder)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    ray = [RAY, "start", "--block", "--num-cpus=2", "--disable-usage-stats"]
    ray += ["--object-store-memory", str(100 << 20)]
    prepare = f"{sys.executable} -m data_prep.prepare {config} ray.num_actors=3"
    head = f"{RAY} start {' '.join(ray[3:])} --head --port 6379 --node-ip-address {ADDRESSES[0]} --include-dashboard=false"
    # A driver sees its node's processes and files: it runs where the head does.
    first = hosts.start(
        0, ["bash", "-c", f"set -e; {head}; sleep 15; RAY_ADDRESS={ADDRESSES[0]}:6379 {prepare}"],
        env=environment, cwd=ROOT,
    )  # fmt: skip
    log = (tmp_path / "second.log").open("w")
    time.sleep(20)
    second = hosts.start(
        1, [*ray, "--address", f"{ADDRESSES[0]}:6379", "--node-ip-address", ADDRESSES[1]],
        env=environment, cwd=ROOT, stdout=log, stderr=log,
    )  # fmt: skip
    commits = tmp_path / "dataset" / "work" / "commits"
    wait_until(lambda: any(commits.rglob("*.json")), 240, "nothing was committed")
    assert second.poll() is None, (tmp_path / "second.log").read_text()
    hosts.cut()
    try:
        output, _ = first.communicate(timeout=400)
    finally:
        hosts.mend()
    assert first.returncode == 0, output
    assert read_manifest(tmp_path / "dataset").counts.kept == 120
    assert verify(tmp_path / "dataset") == []
