"""What tests of several modules share: one Ray, and the tiny encoders."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine starves them


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One embedded Ray for all tests; its address, for drivers in processes of their own."""
    import ray

    from data_prep.pool import RayConfig, connect

    connect(RayConfig(num_cpus=4))
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.test_vae import save_kl

    return save_kl(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.test_text_encoder import save_encoder

    return save_encoder(tmp_path_factory.mktemp("text"), "bert")
