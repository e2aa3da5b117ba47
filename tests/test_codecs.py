"""Every class of codec against the code of diffusers' own pipelines: latents, pictures, what is stored of them."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_img2img import QwenImageImg2ImgPipeline
from torch import Tensor

from data_prep.audit import verify
from data_prep.config import PrepareConfig, check_settings
from data_prep.preparation import prepare
from data_prep.schema import CodecRecord, read_manifest
from models.codec_layouts import LAYOUTS, PIXELS
from models.command import load_config
from models.config import InputError
from models.vae import LatentCodec, sample_latents, to_uint8
from pipeline.inference.exported import export
from pipeline.inference.painter import Painter
from pipeline.objectives.objective import Objective
from pipeline.runs.trained import open_trained
from tests import train_factory
from tests.prep_factory import config_of_pictures, read_samples
from tests.test_export import STOCK, draw, opened
from tests.test_vae import edit_config

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A tiny network, its size of pictures, and diffusers' way to normalised latents and back to pixels."""

    options: dict[str, Any]
    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    size: tuple[int, int] = (32, 48)
    channels: int = 4
    downscale: int = 4


KL = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
}
DC = {f"{s}_block_out_channels": (8, 16, 16) for s in ("encoder", "decoder")}
DC |= {f"{s}_layers_per_block": (1, 1, 1) for s in ("encoder", "decoder")}
DC |= {f"{s}_block_types": "ResBlock" for s in ("encoder", "decoder")}


def column(values: Any) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def sdxl(vae: Any) -> tuple[Tensor, Tensor]:
    """As pipeline_stable_diffusion_xl_img2img.py has it, where the config has statistics."""
    return column(vae.config.latents_mean), column(vae.config.latents_std)


def flux2(vae: Any) -> SimpleNamespace:
    patchify = Flux2Pipeline._patchify_latents
    return SimpleNamespace(vae=vae, _patchify_latents=patchify)


def unflux2(vae: Any, latents: Tensor) -> Tensor:
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    latents = latents * std + vae.bn.running_mean.view(1, -1, 1, 1)
    return vae.decode(Flux2Pipeline._unpatchify_latents(latents)).sample


def qwen(vae: Any, pixels: Tensor) -> Tensor:
    """As the pipeline has it, which samples, but of the mean."""
    mode = lambda x: SimpleNamespace(latents=vae.encode(x).latent_dist.mode())  # noqa: E731
    still = SimpleNamespace(vae=SimpleNamespace(encode=mode, config=vae.config))
    return QwenImageImg2ImgPipeline._encode_vae_image(still, pixels[:, :, None], None)[:, :, 0]


def unqwen(vae: Any, latents: Tensor) -> Tensor:
    """As pipeline_qwenimage.py has it."""
    mean, std = column(vae.config.latents_mean), 1.0 / column(vae.config.latents_std)
    return vae.decode((latents / std + mean)[:, :, None]).sample[:, :, 0]


CASES = {
    "AutoencoderKL": Case(
        {**KL, "scaling_factor": 1.5, "shift_factor": 0.06},
        lambda vae, x: (vae.encode(x).latent_dist.mean - 0.06) * 1.5,
        lambda vae, z: vae.decode(z / 1.5 + 0.06).sample,
    ),
    "AutoencoderKL with statistics": Case(
        {
            **KL,
            "scaling_factor": 0.13,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [0.5, 1, 2, 3],
        },
        lambda vae, x: (vae.encode(x).latent_dist.mean - sdxl(vae)[0]) * 0.13 / sdxl(vae)[1],
        lambda vae, z: vae.decode(z * sdxl(vae)[1] / 0.13 + sdxl(vae)[0]).sample,
    ),
    "AutoencoderKLFlux2": Case(
        {**KL, "latent_channels": 2},
        lambda vae, x: Flux2Pipeline._encode_vae_image(flux2(vae), x, None),
        unflux2,
        channels=8,
        downscale=8,
    ),
    "AutoencoderKLQwenImage": Case(
        {
            "base_dim": 24,
            "z_dim": 4,
            "dim_mult": [1, 2, 4],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True],
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [0.5, 1.0, 2.0, 3.0],
        },
        qwen,
        unqwen,
    ),
    "AutoencoderKLHunyuanImage": Case(
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 32}
        | {"block_out_channels": (32, 64, 64), "layers_per_block": 1}
        | {"spatial_compression_ratio": 4, "scaling_factor": 0.75289},
        lambda vae, x: vae.encode(x).latent_dist.mean * 0.75289,
        lambda vae, z: vae.decode(z / 0.75289).sample,
    ),
    "AutoencoderDC": Case(
        {"latent_channels": 8, "scaling_factor": 0.41407, **DC},
        lambda vae, x: vae.encode(x).latent * 0.41407,
        lambda vae, z: vae.decode(z / 0.41407).sample,
        channels=8,
    ),
    "AutoencoderTiny": Case(
        {f"{s}_block_out_channels": (8,) * 4 for s in ("encoder", "decoder")},
        lambda vae, x: vae.encode(x).latents,
        lambda vae, z: vae.decode(z).sample,
        downscale=8,
    ),
    "AutoencoderRAE": Case(
        {
            "encoder_type": "mae",
            "encoder_hidden_size": 64,
            "encoder_num_hidden_layers": 1,
            "encoder_patch_size": 16,
            "encoder_input_size": 64,
            "patch_size": 8,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 64,
            "latents_mean": np.linspace(-1, 1, 64).reshape(64, 1, 1).tolist(),
            "latents_std": np.linspace(0.5, 2, 64).reshape(64, 1, 1).tolist(),
        },
        lambda vae, x: vae.encode((x + 1) / 2).latent,
        lambda vae, z: vae.decode(z).sample * 2 - 1,
        size=(32, 32),
        channels=64,
        downscale=8,
    ),
}


def make(name: str, folder: Path) -> tuple[Path, Any]:
    """A tiny network with unequal statistics, saved."""
    torch.manual_seed(1)
    case, kind = CASES[name], name.split()[0]
    vae = getattr(diffusers, kind)(**case.options).eval().requires_grad_(False)
    if kind == "AutoencoderKLFlux2":
        vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.4, 8))
        vae.bn.running_var.copy_(torch.linspace(0.2, 3, 8))
    vae.save_pretrained(folder / kind)
    return folder / kind, vae


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


@pytest.mark.parametrize("name", CASES)
def test_latents_and_pictures_are_those_of_diffusers_own_pipeline(tmp_path, name):
    case = CASES[name]
    folder, vae = make(name, tmp_path)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *case.size), dtype=torch.uint8, generator=rng)
    codec = LatentCodec(folder)
    assert (codec.channels, codec.downscale) == (case.channels, case.downscale)
    with torch.no_grad():
        expected = case.encode(vae, images.float() / 127.5 - 1)
        shown = case.decode(vae, expected)
    moments = codec.encode_moments(images)
    still = torch.zeros_like(expected)
    latents = sample_latents(moments, still, codec.normalisation)
    scale = expected.abs().max()
    torch.testing.assert_close(latents / scale, expected / scale, rtol=0, atol=1e-5)
    # What is stored is rounded to float16.
    stored = sample_latents(moments.half(), still, codec.normalisation)
    raw = moments[:, : codec.channels].abs()
    step = (raw * 2**-11 + 2**-24) / column(codec.normalisation.std)
    assert ((stored - latents).abs() <= step * 1.001 + 1e-6).all()
    ours, theirs = codec.decode(stored), to_uint8(shown)
    assert psnr(ours, theirs) > 48
    assert psnr(ours, images) == pytest.approx(psnr(theirs, images), abs=0.01)


@pytest.mark.parametrize("name", CASES)
def test_the_std_of_moments_is_in_the_order_of_their_mean(tmp_path, name):
    folder, vae = make(name, tmp_path)
    codec, case = LatentCodec(folder), CASES[name]
    images = torch.randint(0, 256, (1, 3, *case.size), dtype=torch.uint8)
    moments = codec.encode_moments(images)
    if codec.deterministic:
        assert moments.shape[1] == codec.channels
        return
    pixels = images.float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels[:, :, None] if "Qwen" in name else pixels).latent_dist
    std = posterior.std[:, :, 0] if "Qwen" in name else posterior.std
    if "Flux2" in name:
        std = Flux2Pipeline._patchify_latents(std)
    torch.testing.assert_close(moments[:, codec.channels :], std, rtol=1e-4, atol=1e-6)


def test_the_statistics_of_a_batch_norm_are_read_as_stored_whatever_the_dtype(tmp_path):
    folder, vae = make("AutoencoderKLFlux2", tmp_path)
    codec = LatentCodec(folder, "bf16")
    assert codec.network.bn.running_mean.dtype == torch.bfloat16
    assert list(codec.normalisation.mean) == vae.bn.running_mean.tolist()


def test_pixels_are_stored_as_they_are():
    codec = LatentCodec(None)
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    moments = codec.encode_moments(images)
    assert torch.equal(moments, images.float())
    latents = sample_latents(images, torch.zeros(2, 3, 5, 7), codec.normalisation)
    torch.testing.assert_close(latents, images.float() / 127.5 - 1)
    assert torch.equal(codec.decode(latents), images)
    assert torch.equal(codec.decode_mean(images), images)
    assert CodecRecord.model_validate(codec.record()).class_name == PIXELS


def settings(tmp_path: Path, folder: Path | str, **images: Any) -> PrepareConfig:
    tree = {
        "sources": {"p": {"kind": "folder", "path": str(tmp_path)}},
        "vae": {"path": str(folder)},
        "images": {"bucket_multiple": 8, "resolution": 32, **images},
        "output": str(tmp_path / "out"),
    }
    return PrepareConfig.model_validate(tree)


def test_a_codec_of_one_square_wants_that_bucket_alone(tmp_path):
    folder, _ = make("AutoencoderRAE", tmp_path)
    with pytest.raises(InputError, match=r"squares of 32 pixels alone. Remedy: .*max_aspect=1"):
        check_settings(settings(tmp_path, folder))
    check_settings(settings(tmp_path, folder, bucket_max_aspect=1))


def test_a_codec_of_one_square_draws_no_other(tmp_path, trained_run):
    folder, _ = make("AutoencoderRAE", tmp_path)
    trained = open_trained(trained_run, "ema", None)
    encoders = replace(trained.encoders(CPU), codec=LatentCodec(folder))
    drawing = trained.network(CPU), Objective(trained.config.objective), trained.config.sampler
    for size in ((64, 64), (32, 64)):
        got = f"size: got {size[0]}x{size[1]}, expected 32x32, the only one that the codec takes. Remedy"
        with pytest.raises(InputError, match=got):
            Painter(encoders, ["volcano"]).draw(*drawing, size, [0])


@pytest.mark.parametrize(
    ("name", "lost"), [(name, key) for name in CASES for key in LAYOUTS[name.split()[0]].needs]
)
def test_what_a_config_lacks_is_named_before_anything_is_loaded(tmp_path, name, lost):
    folder, _ = make(name, tmp_path)
    edit_config(folder, **{lost: None})
    with pytest.raises(InputError, match=f"config.json lacks {lost}"):
        check_settings(settings(tmp_path, folder, bucket_max_aspect=1))


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderKLQwenImage", PIXELS])
def test_a_dataset_is_prepared_and_verified_with_it(tmp_path, text_folder, name):
    folder = PIXELS if name == PIXELS else make(name, tmp_path)[0]
    yaml = config_of_pictures(tmp_path, 12, tmp_path, text_folder)
    config = load_config(PrepareConfig, yaml, [f"vae.path={folder}"])
    prepare(config)
    out = Path(config.output)
    manifest = read_manifest(out)
    assert (manifest.codec.class_name, verify(out)) == (name, [])
    kept = [np.load(io.BytesIO(sample["moments.npy"])) for _, sample in read_samples(out)]
    assert len(kept) == 12
    codec = LatentCodec(None if name == PIXELS else folder)
    assert {a.shape[0] for a in kept} == {codec.channels * (1 if codec.deterministic else 2)}
    if name == PIXELS:
        assert manifest.members["moments"].dtype == "uint8"
        assert manifest.generations[0].psnr_db > 70
    else:
        assert manifest.codec.normalisation.mean == codec.normalisation.mean


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, PIXELS])
def test_an_exported_run_decodes_as_the_run_does(tmp_path, text_folder, name):
    """In stock diffusers with nothing of flowmill there."""
    folder = PIXELS if name == PIXELS else make(name, tmp_path)[0]
    changes = [f"vae.path={folder}", "images.resolution=32", "images.bucket_max_aspect=1"]
    yaml = config_of_pictures(tmp_path, 12, tmp_path, text_folder)
    prepare(load_config(PrepareConfig, yaml, changes))
    config = tmp_path / "run.yaml"
    config.write_text(train_factory.CONFIG.format(data=tmp_path / "dataset", run=tmp_path / "run"))
    patch = 8 if name == PIXELS else 2
    options = ["training.images=16", "optimizer.warmup_images=0", "monitor.prompts=[a red apple]"]
    options += ["monitor.heldout_samples=0", f"model.patch_size={patch}", "optimizer.lr=0.1"]
    train_factory.train(config, *options)
    trained = open_trained(tmp_path / "run", "raw", None)
    export(trained, tmp_path / "out" / "model", "fp32", "copy")
    case = {
        "prompts": ["a red apple", "volcano"],
        "size": [32, 32],
        "samplers": [{"name": "euler"}],
    }
    (tmp_path / "out" / "case.json").write_text(json.dumps(case))
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "out" / "model")],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _, (stock,) = opened(tmp_path / "out" / "model")
    ours = draw(trained, case, {"name": "euler", "seed": 7})
    assert (ours.float() - stock).abs().max() < 0.6
    assert ours.float().std() > 1
    if name == "AutoencoderRAE":
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            tmp_path / "out" / "model", trust_remote_code=True
        )
        with pytest.raises(ValueError, match="got 64x32, expected 32x32, the only one"):
            pipeline("volcano", height=64, width=32)
        said = ("--prompt", "volcano", "--size", "64x64")
        done = train_factory.run("pipeline.sample", str(tmp_path / "run"), *said)
        assert done.returncode == 2
        assert "got 64x64, expected 32x32, the only one" in " ".join(done.stderr.split())
