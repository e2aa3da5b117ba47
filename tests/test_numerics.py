"""How a GPU is told to compute, as far as a CPU shows it: what torch is set to when it matters."""

import threading
from typing import Any

import pytest
import torch

from models.networks import DiTConfig
from models.text_conventions import View
from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from models.vision_encoder import VisionEncoder
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.training.config import EngineConfig
from pipeline.training.engine import resolved
from tests import train_factory
from tests.shard_factory import make_dataset
from tests.test_alignment import save_vision


def allowed() -> tuple[bool, bool]:
    """TF32 of products and of convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
def test_an_encoder_computes_as_its_record_says_and_leaves_torch_as_it_was(
    dtype, vae_folder, text_folder, tmp_path
):
    codec = LatentCodec(vae_folder, dtype)
    text = TextEncoder(text_folder, View(max_length=8), dtype)
    vision = VisionEncoder(save_vision(tmp_path / "vit"), 16, dtype)
    before, seen = allowed(), []
    for encoder in (codec, text, vision):
        assert encoder.record()["dtype"] == dtype
        for module in encoder.network.modules():
            module.register_forward_hook(lambda *_: seen.append(allowed()))
    pictures = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    codec.decode(codec.encode_moments(pictures)[:, : codec.channels])
    text.encode(["volcano"])
    vision.encode(pictures)
    assert set(seen) == {(dtype == "tf32",) * 2}
    assert allowed() == before


DETERMINISTIC = """
import sys
from pathlib import Path
import torch
from models.command import load_config
from pipeline import loop
from pipeline.config import TrainConfig
for is_told in ("false", "true"):
    options = [*sys.argv[2:], f"engine.deterministic={is_told}", f"run={sys.argv[1]}.{is_told}"]
    for step in loop.steps(load_config(TrainConfig, Path(sys.argv[1]), options)):
        pass
    print("set", torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
          torch.backends.cuda.cudnn_sdp_enabled())
"""


@pytest.mark.distributed
def test_a_deterministic_run_tells_torch_so_and_does_not_fill_fresh_memory(tmp_path):
    config = str(train_factory.write_config(tmp_path))
    options = ["training.images=16", "optimizer.warmup_images=0"]
    found = train_factory.results("set", "-c", DETERMINISTIC, config, *options, ranks=1)
    assert found == [["False", "True", "True"], ["True", "False", "False"]]


@pytest.fixture
def on_gpu(monkeypatch):
    """What is asked of CUDA by torch's own functions, in order, each with its thread."""
    calls: list[tuple[str, Any]] = []

    def told(name: str, answer: Any = None) -> Any:
        return lambda *_, **__: calls.append((name, threading.current_thread())) or answer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", told("set_device"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", told("is_bf16_supported", True))
    return calls


def test_a_gpu_compiles_unless_told_or_cut_and_says_its_precision_after_it_is_chosen(on_gpu):
    for stage in (0, 1, 2, 3):
        engine = resolved(EngineConfig(zero_stage=stage), None)
        assert (engine.precision, engine.compile) == ("bf16", stage < 3)
    # Else each rank would have a context on the first GPU too.
    assert on_gpu[0][0] == "set_device"
    assert resolved(EngineConfig(compile=False), None).compile is False
    begun = EngineConfig(precision="fp32", compile=False)
    assert resolved(EngineConfig(), begun) == EngineConfig(precision="fp32", compile=False)


def test_a_cpu_does_not_compile_unless_told():
    assert resolved(EngineConfig(), None).compile is False
    assert resolved(EngineConfig(compile=True), None).compile is True


def test_the_thread_that_reads_ahead_chooses_its_gpu_first(tmp_path, request):
    model = DiTConfig(size="debug")
    loader = Loader(
        DataConfig(path=str(make_dataset(tmp_path / "data", [((32, 32), 20)]))),
        global_batch=4, seed=0, model=model,
    )  # fmt: skip
    calls = request.getfixturevalue("on_gpu")  # after the loader, which would pin memory
    next(loader.batches())
    (thread,) = loader._threads
    loader.close()
    assert ("set_device", thread) in calls
