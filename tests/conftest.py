"""What tests of several modules share: one Ray, and the tiny encoders."""

import os
import re
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests import ray_cluster

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine starves them


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One embedded Ray for all tests; its address, for drivers in processes of their own."""
    import ray

    from data_prep.config import RayConfig
    from data_prep.workers import connect

    connect(RayConfig(num_cpus=4))
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def job_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_cluster.RayCluster]:
    """A head with two CPUs that takes jobs, for tests that kill no node of it."""
    with ray_cluster.ray_cluster(tmp_path_factory.mktemp("ray"), [2]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a user has it, for tests that write files into it."""
    return ray_cluster.copy_checkout(tmp_path_factory.mktemp("checkout").resolve() / "flowmill")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """s3://bucket of a real server on loopback, empty."""
    s3fs = pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # An earlier server of this process has left its content, and clients that ask at its address.
    s3fs.S3FileSystem.clear_instance_cache()
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket"
    server.stop()


@cache
def unit_of_work(file: str) -> str:
    """What one of several test processes takes at a time: a file, or all files that share a Ray."""
    text = (Path(__file__).parent.parent / file).read_text()
    return "ray" if re.search("ray_address|job_cluster|trained_run", text) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Units of work go to whichever process is free, those of most tests first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of_work(nodeid.split("::")[0])

    return Scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Say where Ray's log stays, where a test fails while a Ray runs."""
    report = yield
    if report.failed and (places := ray_cluster.logs()):
        report.sections.append(("Ray's log", "\n".join(places)))
    return report


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.test_vae import save_kl

    return save_kl(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.test_text_encoder import save_encoder

    return save_encoder(tmp_path_factory.mktemp("text"), "bert")


RUN = """
data: {{path: {data}}}
model: {{size: debug, size_conditioning: true}}
training: {{images: 960, global_batch: 8}}
optimizer: {{lr: 3e-3}}
ema: {{halflife_images: 80}}
engine: {{zero_stage: 1, precision: fp32, cpu_threads: 1}}
run: {run}
checkpoint: {{every_steps: 60}}
monitor: {{every_steps: 20, sample_every_steps: 60, heldout_samples: 4, prompts: [one, two]}}
"""


@pytest.fixture(scope="session")
def trained_run(
    tmp_path_factory: pytest.TempPathFactory, ray_address: str, vae_folder: Path, text_folder: Path
) -> Path:
    """A run of 120 steps on 48 prepared pictures, a quarter of them held out."""
    from tests import prep_factory, train_factory

    folder = tmp_path_factory.mktemp("end_to_end")
    config = prep_factory.config_of_pictures(
        folder, 48, vae_folder, text_folder, heldout_fraction=0.25
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_address)
        done = train_factory.run("data_prep.prepare", str(config))
    assert done.returncode == 0, done.stderr
    config = folder / "train.yaml"
    config.write_text(RUN.format(data=folder / "dataset", run=folder / "run"))
    train_factory.train(config)
    return folder / "run"
