"""Fits a small AutoencoderKL to pictures that no public autoencoder knows: icons, medical, satellite.

Reads every picture once into memory (uint8), as preparation reads it; fits on all but a held-out part chosen
by file name, and writes a diffusers folder with measured scaling_factor and shift_factor. Run it again to resume.
"""

import hashlib
import heapq
import io
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import typer
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float, UInt8
from rich.progress import Progress, TextColumn, TimeElapsedColumn, track
from torch import Tensor

from data_prep.config import FitVaeConfig
from data_prep.decoder import Address, DecodePool, DecodeRequest
from data_prep.images import ImagesConfig, Picture, Rejected
from data_prep.schema.proof import psnr_db
from data_prep.sources import Item, read_entries
from models.command import plain_console
from models.config import InputError
from models.files import publish, write_whole
from models.vae import LatentCodec, sample_latents
from models.weights import TORCH_DTYPES

console = plain_console(stderr=True)
CHECKPOINT = "checkpoint.pt"


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the file name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def read_pictures(config: FitVaeConfig, name: str) -> tuple[Tensor, Tensor]:
    """The pictures of one source, uint8 (N, 3, R, R): those to fit on, and those held out.

    Each is resized to cover the square, and the centre is cut out. Raises InputError where a part is empty.
    """
    source, rejects = config.sources[name], Counter[str]()
    entries = list(source.entries(name))
    classes = sorted({entry.class_name for entry in entries if entry.class_name})

    def order(item: Item) -> tuple[float, str]:
        # A hash unlike the one that holds pictures out, lest the cut keep the held-out ones first.
        return name_hash("pick " + os.path.basename(item.name)), item.name

    def found() -> Iterator[Item]:
        for item in read_entries(entries, source, classes):
            if item.reason:
                rejects[item.reason] += 1
            else:
                yield item

    items = heapq.nsmallest(config.max_pictures, found(), key=order)
    pool, fitting, heldout = DecodePool(ImagesConfig(), os.cpu_count() or 1), [], []
    named = source.names_pictures
    addresses = (Address(i.path, i.offset, i.length, i.data, named) for i in items)
    bucket = (config.resolution, config.resolution)
    answers = [pool.submit(DecodeRequest(a, None, bucket, (0.5, 0.5))) for a in addresses]
    pairs = zip(items, answers, strict=True)
    for item, future in track(pairs, f"Reading {name}", len(items), console=console):
        answer = future.result()
        if isinstance(answer, Picture):
            is_heldout = name_hash(os.path.basename(item.name)) < config.heldout_fraction
            (heldout if is_heldout else fitting).append(answer.pixels.transpose(2, 0, 1))
        else:
            assert isinstance(answer, Rejected)
            rejects[answer.reason] += 1
    told = f"{len(fitting)} pictures to fit on, {len(heldout)} held out, rejected: {dict(rejects)}"
    if not (fitting and heldout):
        remedy = "expected some of each. Remedy: more pictures."
        raise InputError(f"sources.{name}: got {told}; {remedy}")
    console.print(f"{name}: {told}")
    return torch.from_numpy(np.stack(fitting)), torch.from_numpy(np.stack(heldout))


def build(config: FitVaeConfig) -> AutoencoderKL:
    """An AutoencoderKL without attention, initialised from the seed."""
    levels = len(config.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
            block_out_channels=tuple(config.channels),  # pyright: ignore[reportArgumentType]
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=8,
            sample_size=config.resolution,
            force_upcast=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )


def batch_loss(
    vae: AutoencoderKL,
    pixels: Float[Tensor, "B 3 R R"],
    noise: Float[Tensor, "B C h w"],
    config: FitVaeConfig,
) -> Float[Tensor, ""]:
    """The weighted loss of one batch; pixels in [-1, 1]."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        posterior: Any = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        output: Any = vae.decode(posterior.mean + posterior.std * noise)
    error, weight = output.sample.float() - pixels, config.loss
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / pixels.numel()
    reconstruction = weight.l1 * error.abs().mean() + weight.mse * error.square().mean()
    return reconstruction + weight.edges * edges + weight.kl * kl


def learning_rate(config: FitVaeConfig, done: float) -> float:
    """Linear warm-up over 2% of the run, then a half cosine to zero."""
    return config.lr * min(done / 0.02 + 0.01, 0.5 + 0.5 * math.cos(math.pi * done), 1.0)


def draw_batch(sources: list[Tensor], step: int, config: FitVaeConfig) -> tuple[Tensor, Tensor]:
    """Pixels and latent noise of a step, sources in equal parts: a function of seed and step alone."""
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    source = torch.randint(len(sources), (config.batch_size,), generator=rng).tolist()
    place = torch.rand(config.batch_size, generator=rng, dtype=torch.float64).tolist()
    drawn = zip(source, place, strict=True)
    chosen = torch.stack([sources[i][int(u * len(sources[i]))] for i, u in drawn])
    mirrored = torch.rand(config.batch_size, 1, 1, 1, generator=rng) < 0.5
    chosen = torch.where(mirrored, chosen.flip(3), chosen)
    side = config.resolution >> (len(config.channels) - 1)
    noise = torch.randn(config.batch_size, config.latent_channels, side, side, generator=rng)
    return chosen.float() / 127.5 - 1, noise


def fit(vae: AutoencoderKL, sources: list[Tensor], config: FitVaeConfig, work: Path) -> None:
    """Train in place, saving to `work` and resuming from there; raises InputError if the config changed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(vae.train(), device)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0)
    checkpoint, step, elapsed_s, smooth = work / CHECKPOINT, 0, 0.0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["config"] != config.model_dump_json():
            raise InputError(
                f"{work}: begun with another config, {state['config']}. Remedy: remove it."
            )
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed_s, smooth = state["step"], state["elapsed_s"], state["smooth"]
        console.print(f"resuming from step {step}")
    start, saved = time.monotonic() - elapsed_s, time.monotonic()
    columns = (TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*Progress.get_default_columns(), *columns, console=console) as progress:
        task = progress.add_task("Fitting", total=1.0, note="")
        while True:
            elapsed_s = time.monotonic() - start
            done = step / config.steps if config.steps else elapsed_s / (60 * (config.minutes or 1))
            if done >= 1:
                break
            optimizer.param_groups[0]["lr"] = learning_rate(config, done)
            pixels, noise = draw_batch(sources, step, config)
            loss = batch_loss(vae, pixels.to(device), noise.to(device), config)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            smooth = 0.98 * smooth + 0.02 * loss.item() if step > 1 else loss.item()
            progress.update(task, completed=done, note=f"step {step} loss {smooth:.4f}")
            if time.monotonic() - saved < 60 * config.checkpoint_minutes:
                continue
            state = {"config": config.model_dump_json(), "step": step, "smooth": smooth}
            state |= {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(state | {"elapsed_s": time.monotonic() - start}, checkpoint)
            saved = time.monotonic()
            console.print(f"step {step}, {done:.0%}: loss {smooth:.4f}, checkpoint saved")


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """The old checkpoint stays until the new one is whole."""
    data = io.BytesIO()
    # torch.save to a full disk would not say what is wrong.
    torch.save(state, data)
    write_whole(path, lambda temporary: temporary.write_bytes(data.getbuffer()))


@torch.inference_mode()
def export(vae: AutoencoderKL, pictures: Tensor, config: FitVaeConfig, folder: Path) -> None:
    """Write the diffusers folder, its scale and shift measured on (up to 4,096 of) the pictures."""
    torch.nn.Module.to(vae.eval(), "cpu", getattr(torch, TORCH_DTYPES[config.save_dtype]))
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    vae.save_pretrained(folder)
    codec, rng = LatentCodec(folder), torch.Generator().manual_seed(config.seed)
    latents = []
    for batch in pictures[torch.randperm(len(pictures), generator=rng)[:4096]].split(64):
        moments = codec.encode_moments(batch)
        noise = torch.randn(moments[:, : codec.channels].shape, generator=rng)
        latents.append(sample_latents(moments, noise, codec.normalisation))
    std, mean = torch.std_mean(torch.cat(latents))
    vae.register_to_config(scaling_factor=1 / std.item(), shift_factor=mean.item())
    vae.save_pretrained(folder)


def heldout_psnr(codec: LatentCodec, pictures: UInt8[Tensor, "N 3 H W"]) -> float:
    """Mean PSNR in dB of the pictures decoded from their posterior's mean, which is normalised and back."""
    values = list[float]()
    for batch in pictures.split(64):
        decoded = codec.decode_mean(codec.encode_moments(batch)).cpu()
        values += map(psnr_db, batch.numpy(), decoded.numpy())
    return fmean(values)


def run(config: FitVaeConfig) -> None:
    """Fit, export, measure the held-out PSNR of each source, then put the folder in its place."""
    if config.output.exists():
        raise InputError(f"{config.output}: exists. Remedy: name another output, or remove it.")
    work = config.output.with_name(config.output.name + ".work")
    sources = {name: read_pictures(config, name) for name in config.sources}
    fitting = [pictures for pictures, _ in sources.values()]
    vae = build(config)
    fit(vae, fitting, config, work)
    export(vae, torch.cat(fitting), config, work / "final")
    codec = LatentCodec(work / "final")
    result = {name: heldout_psnr(codec, heldout) for name, (_, heldout) in sources.items()}
    report = {"heldout_psnr_db": result, "config": config.model_dump(mode="json")}
    (work / "final" / "fit_vae.json").write_text(json.dumps(report, indent=2) + "\n")
    publish(work / "final", config.output)
    (work / CHECKPOINT).unlink(missing_ok=True)
    # Whatever else lies there is not ours.
    with suppress(OSError):
        work.rmdir()
    for name, value in result.items():
        typer.echo(f"{name}: {value:.2f} dB PSNR on {len(sources[name][1])} held-out pictures")
    mean, std = codec.normalisation.mean[0], codec.normalisation.std[0]
    typer.echo(f"{config.output}: scaling_factor {1 / std:.4f}, shift_factor {mean:.4f}")
