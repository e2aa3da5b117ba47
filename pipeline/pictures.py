"""Prompts to pictures with a trained network: used by the trainer's grids, `sample` and `evaluate`."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from data_prep.schema import CodecRecord, Manifest
from models.conditions import Conditions
from models.config import InputError
from models.files import write_whole
from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from models.weights import weights_sha256
from pipeline import distributed
from pipeline.objective import Objective
from pipeline.objectives_config import SamplerConfig
from pipeline.randomness import draw_noise
from pipeline.sampling import generate


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


@dataclass(frozen=True)
class Encoders:
    """A dataset's codec and its text encoders in its order, each checked to be the one that prepared the data."""

    record: CodecRecord
    codec: LatentCodec
    codec_folder: Path
    text: list[TextEncoder]
    device: torch.device


def load_encoders(
    manifest: Manifest, vae: str | None, text: dict[str, str], device: torch.device
) -> Encoders:
    """Load them from `vae` and `text` (a folder by name) where given, else from where they were."""
    record, encoders = manifest.codec, []
    where = encoder_folder(record.path, vae, record.weights_sha256, "encoders.vae")
    codec = LatentCodec.load(where, record.dtype, device)  # pyright: ignore[reportArgumentType]
    for name, encoder in manifest.text.roles.items():
        folder = encoder_folder(
            encoder.path, text.get(name), encoder.weights_sha256, f"encoders.text.{name}"
        )
        encoders.append(TextEncoder.load(folder, encoder.view.max_length, encoder.dtype, device))  # pyright: ignore[reportArgumentType]
    return Encoders(record, codec, where, encoders, device)


def encode_captions(encoders: list[TextEncoder], captions: list[str]) -> Conditions:
    """Every encoder's view of the captions, fp32, rounded as the dataset stores them; none without text."""
    if not encoders:
        return Conditions()
    tokens, masks, pooled = zip(*(encoder.encode(captions) for encoder in encoders), strict=True)
    width = max(part.shape[-1] for part in tokens)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in tokens]
    text_emb, text_mask = torch.cat(padded, dim=1), torch.cat(masks, dim=1)
    return Conditions(text_emb.half().float(), text_mask, torch.cat(pooled, dim=1).half().float())


def parse_class(prompt: str, num_classes: int) -> tuple[int, str]:
    """Class and text of "207" or "207: a retriever"; raises InputError."""
    match = re.fullmatch(r"(\d+)(?:: *(.*))?", prompt.strip())
    if not match or int(match[1]) >= num_classes:
        raise InputError(
            f'prompt {prompt!r}: expected a class from 0 to {num_classes - 1}, alone or before ": TEXT"'
        )
    return int(match[1]), match[2] or ""


class Painter:
    """Draws prompts, which are encoded once, with any network; it keeps the codec, not the text encoders.

    Of a class-conditional network a prompt is the class's number, and if there is text too, "NUMBER: TEXT".
    """

    def __init__(self, encoders: Encoders, prompts: list[str], num_classes: int = 0):
        self.record, self.codec, self.device = encoders.record, encoders.codec, encoders.device
        self.prompts, texts = prompts, prompts
        # The empty caption, and no class, go last and make the unconditional half.
        label = None
        if num_classes:
            labels, texts = zip(*(parse_class(p, num_classes) for p in prompts), strict=True)
            label = torch.tensor([*labels, num_classes], device=self.device)
        self.encoded = encode_captions(encoders.text, [*texts, ""])._replace(label=label)

    def _conditions(self, rows: list[int], size: tuple[int, int]) -> Conditions:
        """What a network is told of `rows` of the encoded prompts, drawn at `size`."""
        micro = torch.tensor([[*size, 0.0, 0.0]], device=self.device).expand(len(rows), 4)
        return self.encoded.map(lambda value: value[rows])._replace(micro=micro)

    @torch.no_grad()
    def draw_batch(
        self,
        network: nn.Module,
        objective: Objective,
        sampler: SamplerConfig,
        size: tuple[int, int],
        rows: list[int],
        places: list[int],
    ) -> UInt8[Tensor, "B 3 H W"]:
        """Pictures of `size` (height, width) pixels of prompts `rows`, each from the noise of its place."""
        down, channels = self.record.downscale, self.record.channels
        multiple = down * network.config.latent_multiple  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
        if any(side % multiple for side in size):
            raise InputError(f"size: got {size[0]}x{size[1]}, expected multiples of {multiple}")
        shape = (channels, size[0] // down, size[1] // down)
        noise = draw_noise(sampler.seed, 0, places, shape, self.device, "pictures")
        cond = self._conditions(rows, size)
        uncond = self._conditions([len(self.prompts)] * len(rows), size)
        latents = generate(network, objective, noise, cond, uncond, sampler, places)
        return self.codec.decode(latents).cpu()

    def draw(
        self,
        network: nn.Module,
        objective: Objective,
        sampler: SamplerConfig,
        size: tuple[int, int],
        batch_size: int = 16,
    ) -> UInt8[Tensor, "B 3 H W"]:
        """One picture per prompt; picture i from the noise of place i."""
        every = list(range(len(self.prompts)))
        parts = [every[i : i + batch_size] for i in range(0, len(every), batch_size)]
        return torch.cat(
            [self.draw_batch(network, objective, sampler, size, part, part) for part in parts]
        )


@dataclass(frozen=True)
class Request:
    """One picture to draw to a file, from the noise of (sampler.seed, place)."""

    path: Path
    prompt: str
    place: int
    size: tuple[int, int]
    sampler: SamplerConfig


Draw = Callable[[list[Request]], UInt8[Tensor, "B 3 H W"]]


def draw_files(requests: list[Request], draw: Draw, facts: dict[str, Any], batch_size: int) -> None:
    """Write this rank's share of the pictures, what made each in its chunk `flowmill`.

    `draw` gets requests of one size and sampler. A file is whole or absent.
    """
    groups: dict[Any, list[Request]] = {}
    for request in requests[distributed.rank() :: distributed.world_size()]:
        groups.setdefault((request.size, request.sampler), []).append(request)
    for group in groups.values():
        for begin in range(0, len(group), batch_size):
            batch = group[begin : begin + batch_size]
            for request, picture in zip(batch, draw(batch), strict=True):
                size = f"{request.size[0]}x{request.size[1]}"
                made = {"prompt": request.prompt, "index": request.place, "size": size}
                info = PngInfo()
                sampler = request.sampler.model_dump(mode="json")
                info.add_itxt("flowmill", json.dumps(facts | sampler | made))
                save = partial(to_pil(picture).save, format="PNG", pnginfo=info)
                write_whole(request.path, save, durable=False)


def drawer(encoders: Encoders, network: nn.Module, objective: Objective) -> Draw:
    """Draws requests, whose prompts it encodes as they come."""
    num_classes = network.config.num_classes  # pyright: ignore[reportAttributeAccessIssue]

    def draw(requests: list[Request]) -> Tensor:
        painter = Painter(encoders, [request.prompt for request in requests], num_classes)  # pyright: ignore[reportArgumentType]
        places = [request.place for request in requests]
        sampler, size = requests[0].sampler, requests[0].size
        rows = list(range(len(requests)))
        return painter.draw_batch(network, objective, sampler, size, rows, places)

    return draw


def read_picture(path: Path) -> UInt8[Tensor, "3 H W"]:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


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
