"""How a GPU is told to compute, as far as a CPU shows it: what torch is set to when it matters."""

import pytest
import torch

from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from models.vision_encoder import VisionEncoder
from tests import train_factory
from tests.test_alignment import save_vision


def allowed() -> tuple[bool, bool]:
    """TF32 of products and of convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
def test_an_encoder_computes_as_its_record_says_and_leaves_torch_as_it_was(
    dtype, vae_folder, text_folder, tmp_path
):
    codec = LatentCodec.load(vae_folder, dtype)
    text = TextEncoder.load(text_folder, 8, dtype)
    vision = VisionEncoder.load(save_vision(tmp_path / "vit"), 16, dtype)
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
for step in loop.steps(load_config(TrainConfig, Path(sys.argv[1]), sys.argv[2:])):
    pass
print("set", torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
      torch.backends.cuda.cudnn_sdp_enabled())
"""


@pytest.mark.distributed
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_deterministic_run_tells_torch_so_and_does_not_fill_fresh_memory(deterministic, tmp_path):
    options = [f"engine.deterministic={str(deterministic).lower()}", "training.images=16"]
    done = train_factory.run(
        "-c", DETERMINISTIC, str(train_factory.write_config(tmp_path)), *options
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("set "))
    assert line == f"set {deterministic} {not deterministic} {not deterministic}"
