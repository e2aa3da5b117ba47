"""Training on a GPU: every network, stage and precision, and what has to hold there.

Each test also runs on the CPU, marked slow, so that what it needs is known to work before a GPU is there.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.layers import sdpa
from models.text_conventions import View
from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from tests import train_factory
from tests.benchmarks.pack import THERE, closure
from tests.train_factory import scalars, train, unlike, write_config

KINDS = ("dit", "mmdit", "uvit", "unet")
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cpu", marks=pytest.mark.slow),
]
BF16 = {"rtol": 0, "atol": 2e-2}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the test trains; processes that it starts see no GPU where that is the CPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if request.param == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return request.param


def losses(run: Path) -> list[float]:
    return [value for _, value in scalars(run, "loss/train")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_trains_is_saved_and_goes_on(kind, stage, precision, device, tmp_path):
    config, run = write_config(tmp_path), tmp_path / "run"
    options = [f"model.kind={kind}", f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    train(config, *options, "training.images=80")
    first = losses(run)
    train(config, *options, "training.images=160", "--override")
    found = losses(run)
    assert found[:10] == first
    assert len(found) == 20
    assert torch.tensor(found).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_20_steps_on_a_gpu_have_the_losses_of_the_cpu(kind, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    for name, visible in (("gpu", None), ("cpu", "")):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        options = [f"model.kind={kind}", "training.images=160"]
        train(write_config(tmp_path, name), *options)
    ours, theirs = (torch.tensor(losses(tmp_path / name)) for name in ("gpu", "cpu"))
    # Convolutions of fp32 training may use TF32, 10 bits of mantissa.
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_train_on_every_shape(kind, device, tmp_path):
    config = write_config(tmp_path)
    options = [f"model.kind={kind}", "engine.compile=true", "training.images=96"]
    train(config, *options, "data.pad_text=longest")
    assert torch.tensor(losses(tmp_path / "run")).isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_backends_of_sdpa_agree(backend, masked, device):
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return torch.randn(2, length, 4, 64, generator=generator).to(device, torch.bfloat16)

    q, k, v = draw(40), draw(24), draw(24)
    keep = torch.arange(24) < torch.tensor([[9], [24]])
    mask = keep[:, None, None].to(device) if masked else None
    with sdpa_kernel([SDPBackend.MATH]):
        expected = sdpa(q, k, v, mask)
    try:
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            out = sdpa(q, k, v, mask)
    except RuntimeError as error:
        pytest.skip(f"{backend} does not run here: {str(error).splitlines()[0]}")
    torch.testing.assert_close(out, expected, **BF16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deterministic_run_has_the_same_bits_twice_and_resumed(kind, device, tmp_path):
    options = [f"model.kind={kind}", "engine.deterministic=true", "engine.precision=bf16"]
    options += ["engine.zero_stage=1", "optimizer.schedule=constant_with_warmup"]
    for name in ("run", "again"):
        train(write_config(tmp_path, name), *options)
    assert unlike(tmp_path / "run", tmp_path / "again") == []
    resumed = write_config(tmp_path, "resumed")
    train(resumed, *options, "training.images=96")
    train(resumed, *options, "--override")
    assert unlike(tmp_path / "resumed", tmp_path / "run") == []


def test_batches_lie_in_pinned_memory_and_reach_the_device_whole(device, tmp_path):
    write_config(tmp_path)
    loader = Loader(DataConfig(path=str(tmp_path / "dataset")), global_batch=8, seed=0)  # pyright: ignore[reportCallIssue]
    batches = loader.batches(0)
    for _ in range(4):
        batch = next(batches)
        moved = batch.to(device)
        assert batch.moments.is_pinned() == (device == "cuda")
        assert moved.moments.device.type == device
        assert torch.equal(moved.moments.cpu(), batch.moments)
        assert moved.text_emb is not None
        assert batch.text_emb is not None
        assert torch.equal(moved.text_emb.cpu(), batch.text_emb)
    loader.close()


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16", "fp16"])
def test_encoders_of_every_dtype_are_near_to_fp32_on_the_cpu(
    dtype, device, vae_folder, text_folder
):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    limit = {"fp32": 2e-5, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}[dtype]
    found: dict[str, list[Any]] = {}
    for name, place in (("fp32", "cpu"), (dtype, device)):
        codec = LatentCodec(vae_folder, name, place)
        text = TextEncoder(text_folder, View(max_length=8), name, place)
        found[place + name] = [
            codec.encode_moments(pictures).cpu(),
            text.encode(["a red"])[0].cpu(),
        ]
    expected, *others = found.values()
    for out, whole in zip((others or [expected])[0], expected, strict=True):
        assert (out - whole).abs().max() <= limit * whole.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("stage", range(4))
def test_two_gpus_train_as_one(stage, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"torch sees {torch.cuda.device_count()} GPUs, two are needed")
    for name, ranks in (("one", 1), ("two", 2)):
        train(write_config(tmp_path, name), f"engine.zero_stage={stage}", ranks=ranks)
    ours, theirs = (torch.tensor(losses(tmp_path / name)) for name in ("two", "one"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_what_is_packed_for_such_a_machine_trains_there_without_a_network(tmp_path):
    """In a bare virtual environment that has only what the machine has of its own."""
    packed, bare = tmp_path / "packed", tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "tests.benchmarks.pack", str(packed)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    there, site = closure(tuple(THERE), without=set()), next(bare.glob("lib/*/site-packages"))
    for name in there.keys() - {p.name for p in (packed / "packages").iterdir()}:
        for top in {file.parts[0] for file in importlib.metadata.files(name) or []} - {".."}:
            link, target = site / top, Path(sysconfig.get_path("purelib")) / top
            if not (link.exists() or (packed / "packages" / top).exists()):
                link.symlink_to(target)
    config = write_config(tmp_path)
    offline = ["unshare", "--net"] if os.geteuid() == 0 else []
    # Without a network there is no loopback either, which ranks meet on.
    up = 'ip link set lo up 2>/dev/null || true; exec "$@"'
    shell = [*offline, "sh", "-c", up, "sh"] if offline else []
    places = f"{packed / 'packages'}:{packed / 'flowmill'}"
    module = [str(bare / "bin" / "python"), "-m", "pipeline.train", str(config)]
    done = subprocess.run(
        [*shell, *module, "training.images=16", "optimizer.warmup_images=0"],
        capture_output=True,
        text=True,
        cwd=packed / "flowmill",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": places, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2/2" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("call", ["runs", "waits", "bits", "memory"])
def test_each_call_of_the_first_half_hour_ends_with_figures(call, tmp_path):
    done = train_factory.run(
        "tests.benchmarks.gpu", call, "--tiny", "--json", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "out").read_text())["figures"]
    assert figures
    if call == "bits":
        assert [
            figures[f"{n} debug deterministic"][how]
            for n in ("DiT", "MMDiT")
            for how in ("twice", "resumed")
        ] == [0] * 4


@pytest.mark.gpu
def test_the_doctor_finds_the_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    done = train_factory.run("pipeline.doctor", "--folder", str(tmp_path), "--need-gib", "0.1")
    assert torch.cuda.get_device_name() in done.stdout, json.dumps(done.stdout)
