"""Stages as Ray jobs on two raylets behind a token: submitted, followed, a node killed in the midst."""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.audit import verify
from data_prep.schema import read_manifest
from tests import prep_factory, train_factory
from tests.ray_cluster import TOKEN, RayCluster, ray_cluster
from tests.train_factory import scalars

ROOT = Path(__file__).parent.parent
LONG = ("engine.zero_stage=2", "training.images=4800")  # 600 steps, so that a kill falls among them
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def whole_cluster(tmp_path_factory) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray"), [2]) as started:
        yield started


@pytest.fixture
def cluster(whole_cluster) -> RayCluster:
    """The head and another raylet, two CPUs each."""
    if len(whole_cluster.nodes) == 1 or whole_cluster.nodes[-1].poll() is not None:
        whole_cluster.start(2)
    return whole_cluster


def submit(cluster: RayCluster, checkout: Path, *arguments: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.submit", *arguments],
        cwd=checkout,
        env={**cluster.environment, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_wrong_token_and_a_missing_one_are_refused_and_not_shown(cluster, checkout):
    wrong = {"RAY_AUTH_TOKEN": "f" * 64}
    for environment in (wrong, {"RAY_AUTH_TOKEN_PATH": "/nowhere"}, {"RAY_AUTH_MODE": "disabled"}):
        job = submit(cluster, checkout, "evaluate", "/run", **environment)
        output, _ = job.communicate()
        assert job.returncode == 2, output
        assert "refused the token" in output
        assert "f" * 64 not in output
        assert "Traceback" not in output


def expect_no_secret(folder: Path, *outputs: str) -> None:
    """The cluster's token is in no file that the job wrote, nor in what was shown of it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [text for text in outputs if TOKEN in text]


def test_a_preparation_outlives_a_killed_node(tmp_path, cluster, checkout, vae_folder, text_folder):
    config = prep_factory.config_of_pictures(tmp_path, 240, vae_folder, text_folder)
    shutil.copy(config, checkout / "job.yaml")
    dataset = tmp_path / "dataset"
    options = [f"output={dataset}", "ray.num_actors=3", "--name", "prepare-1"]
    job = submit(cluster, checkout, "prepare", "job.yaml", *options)
    node = cluster.nodes[-1]
    while len(list((dataset / "work" / "commits").rglob("*.json"))) < 4 or not _actors(node):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.2)
    cluster.kill_raylet(node)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "prepare-1: SUCCEEDED" in output
    assert read_manifest(dataset).counts.kept == 240
    assert verify(dataset) == []
    line = next(line for line in output.splitlines() if " ray job status " in line)
    status = subprocess.run(shlex.split(line), env=cluster.environment, capture_output=True)
    assert b"succeeded" in status.stdout
    expect_no_secret(dataset, output, status.stdout.decode())


def _actors(node: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(node.pid).children(recursive=True)
    return [p for p in children if p.name().startswith("ray::ShardEncod")]


def begin_training(tmp_path: Path, cluster: RayCluster, checkout: Path, *options: str):
    """A followed training job at its 14th step, two ranks on two nodes; its output so far."""
    config = train_factory.write_config(tmp_path, "job")
    shutil.copy(config, checkout / "train.yaml")
    job = submit(
        cluster, checkout, "train", "train.yaml", *LONG, "--cpu", "--workers", "2",
        "--cpus-per-worker", "2", *options,
    )  # fmt: skip
    return job, train_factory.wait_for(job, "step 14/")


def test_training_with_a_killed_node_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path, cluster, checkout
):
    job, _ = begin_training(tmp_path, cluster, checkout)
    cluster.kill_raylet(cluster.nodes[-1])
    cluster.start(2)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "resuming at step" in output
    expect_no_secret(tmp_path / "job", output)
    train_factory.check_as_undisturbed(tmp_path / "job", *LONG, step=600)


def test_a_lost_node_leaves_a_smaller_group_with_the_same_batches(tmp_path, cluster, checkout):
    job, _ = begin_training(tmp_path, cluster, checkout, "--min-workers", "1")
    cluster.kill_raylet(cluster.nodes[-1])
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "resuming at step" in output
    whole = train_factory.write_config(tmp_path, "whole")
    train_factory.train(whole, *LONG, ranks=2)
    ours, theirs = (dict(scalars(tmp_path / name, "loss/train")) for name in ("job", "whole"))
    # Another order of summing, 600 steps; other samples differ by 10%.
    assert ours == pytest.approx(theirs, rel=1e-2)
