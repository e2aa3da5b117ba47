"""Prompts to pictures with a trained network: used by the trainer's grids, `sample` and `evaluate`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_prep.schema import Manifest
from models.config import InputError
from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from models.weights import weights_sha256
from pipeline.objective import Objective, draw_noise
from pipeline.sampling import SamplerConfig, generate


@dataclass(frozen=True)
class Conditioning:
    """Captions as a network takes them; tokens of several encoders one after another."""

    text_emb: Float[Tensor, "B L D"]
    text_mask: Bool[Tensor, "B L"]
    pooled: Float[Tensor, "B P"]


def encoder_folder(recorded: str, given: str | None, sha256: str, key: str) -> Path:
    """Where an encoder is here: `given` by the config, else as recorded; raises InputError if it is another one."""
    folder = Path(given or recorded)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder. Remedy: {key}=FOLDER with the encoder that prepared the data."
        )
    if (got := weights_sha256(folder)) != sha256:
        raise InputError(
            f"{key}: {folder} is not the encoder that prepared the data: weights got sha256 {got[:12]}, "
            f"expected {sha256[:12]} (prepared with {recorded}). Remedy: give that one's folder, or prepare again."
        )
    return folder


def encode_captions(
    manifest: Manifest, folders: dict[str, str], captions: list[str], device: torch.device
) -> Conditioning | None:
    """Every encoder's view of the captions, fp32, rounded as the dataset stores them; None without text."""
    if not manifest.text_encoders:
        return None
    tokens, masks, pooled = [], [], []
    for name, record in manifest.text_encoders.items():
        folder = encoder_folder(
            record.path, folders.get(name), record.weights_sha256, f"encoders.text.{name}"
        )
        encoder = TextEncoder.load(folder, record.max_length, record.dtype, device)  # pyright: ignore[reportArgumentType]
        parts = encoder.encode(captions)
        tokens.append(parts[0])
        masks.append(parts[1])
        pooled.append(parts[2])
    width = max(part.shape[-1] for part in tokens)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in tokens]
    text_emb, text_mask = torch.cat(padded, dim=1), torch.cat(masks, dim=1)
    return Conditioning(text_emb.half().float(), text_mask, torch.cat(pooled, dim=1).half().float())


class Painter:
    """Draws the same prompts at the same noise with any network: prompts are encoded once, here."""

    def __init__(
        self,
        manifest: Manifest,
        prompts: list[str],
        vae: str | None,
        text: dict[str, str],
        device: torch.device,
    ):
        self.manifest, self.prompts, self.device = manifest, prompts, device
        codec = manifest.codec
        folder = encoder_folder(codec.path, vae, codec.weights_sha256, "encoders.vae")
        self.codec = LatentCodec.load(folder, codec.dtype, device)  # pyright: ignore[reportArgumentType]
        # The empty caption goes last and makes the unconditional half.
        self.encoded = encode_captions(manifest, text, [*prompts, ""], device)

    def _conditioning(self, rows: list[int], size: tuple[int, int]) -> dict[str, Tensor]:
        """Arguments of a network's forward, for `rows` of the encoded prompts."""
        micro = torch.tensor([[*size, 0.0, 0.0]], device=self.device).expand(len(rows), 4)
        if self.encoded is None:
            return {"micro": micro}
        encoded = self.encoded
        return {
            "text_emb": encoded.text_emb[rows],
            "text_mask": encoded.text_mask[rows],
            "pooled": encoded.pooled[rows],
            "micro": micro,
        }

    @torch.no_grad()
    def draw(
        self,
        network: Callable[..., Tensor],
        objective: Objective,
        sampler: SamplerConfig,
        size: tuple[int, int],
        batch_size: int = 16,
        images_per_prompt: int = 1,
    ) -> UInt8[Tensor, "B 3 H W"]:
        """Pictures of `size` (height, width) pixels, prompt by prompt; noise i is that of (seed, i)."""
        down, channels = self.manifest.codec.downscale, self.manifest.codec.latent_channels
        if any(side % down for side in size):
            raise InputError(f"size: got {size[0]}x{size[1]}, expected multiples of {down}")
        shape = (channels, size[0] // down, size[1] // down)
        prompts = [i for i in range(len(self.prompts)) for _ in range(images_per_prompt)]
        pictures = []
        for begin in range(0, len(prompts), batch_size):
            rows = prompts[begin : begin + batch_size]
            places = range(begin, begin + len(rows))
            noise = draw_noise(sampler.seed, 0, places, shape, self.device, "pictures")
            cond = self._conditioning(rows, size)
            uncond = self._conditioning([len(self.prompts)] * len(rows), size)
            latents = generate(network, objective, noise, cond, uncond, sampler)
            pictures.append(self.codec.decode(latents).cpu())
        return torch.cat(pictures)


def largest_bucket(manifest: Manifest) -> tuple[int, int]:
    """Height and width of the bucket with the most samples."""
    bucket = max(manifest.buckets, key=lambda b: b.num_samples)
    return bucket.height, bucket.width


def to_pil(picture: UInt8[Tensor, "3 H W"]) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def grid(
    pictures: UInt8[Tensor, "B 3 H W"], labels: list[str], columns: int, cell: int = 128
) -> Image.Image:
    """Pictures in rows, each over its label, small ones enlarged to about `cell` pixels."""
    height, width = pictures.shape[-2:]
    scale = max(1, cell // max(height, width))
    height, width, gap, line = height * scale, width * scale, 6, 13
    font = ImageFont.load_default(11)
    wrapped = [_wrap(label, font, width) for label in labels]
    text = max([len(lines) for lines in wrapped] or [0]) * line
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + text + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        x = gap + number % columns * (width + gap)
        y = gap + number // columns * (height + text + gap)
        sheet.paste(to_pil(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for row, words in enumerate(wrapped[number] if number < len(wrapped) else []):
            draw.text((x, y + height + 1 + row * line), words, fill="black", font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Words in at most three lines no wider than `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:3]
