"""Prompts to pictures with a trained network: used by the trainer's grids, `sample` and `evaluate`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from data_prep.schema import Manifest
from data_prep.schema.recorded import Encoders
from models.conditions import Conditions
from models.files import write_whole
from models.prompts import join_texts, parse_classes
from pipeline import distributed
from pipeline.data.randomness import draw_noise
from pipeline.inference.grid import to_pil
from pipeline.objectives.config import SamplerConfig
from pipeline.objectives.objective import Objective
from pipeline.objectives.sampling import Guidance, generate
from pipeline.runs.trained import Trained


class Painter:
    """Draws prompts, which are encoded once, with any network; it keeps the codec, not the text encoders.

    Of a class-conditional network a prompt is the class's number, and if there is text too, "NUMBER: TEXT".
    """

    guide: nn.Module | None = None
    """What guidance leads away from, in place of the network without a prompt."""

    def __init__(self, encoders: Encoders, prompts: list[str], num_classes: int = 0):
        self.record, self.codec, self.device = encoders.record, encoders.codec, encoders.device
        self.prompts = prompts
        # The empty caption, and no class, go last and make the unconditional half.
        texts, label = parse_classes(prompts, num_classes, self.device)
        record = encoders.text_record
        encoded = {
            name: encoder.encode_prompts(texts, record.roles[name].store, record.empty)
            for name, encoder in encoders.text.items()
        }
        self.encoded = join_texts(encoded, record)._replace(label=label)

    def _conditions(self, rows: list[int], size: tuple[int, int]) -> Conditions:
        """What a network is told of `rows` of the encoded prompts, drawn at `size`."""
        return self.encoded.map(lambda value: value[rows]).drawn(len(rows), size, self.device)

    @torch.no_grad()
    def draw(
        self,
        network: nn.Module,
        objective: Objective,
        sampler: SamplerConfig,
        size: tuple[int, int],
        places: list[int],
        batch_size: int = 16,
    ) -> UInt8[Tensor, "B 3 H W"]:
        """One picture of `size` (height, width) pixels per prompt, each from the noise of its place."""
        down, channels, last = self.record.downscale, self.record.channels, len(self.prompts)
        config: Any = network.config
        self.codec.layout.check_size(size, down * config.latent_multiple)
        shape, pictures = (channels, size[0] // down, size[1] // down), list[Tensor]()
        for begin in range(0, last, batch_size):
            rows = list(range(begin, min(begin + batch_size, last)))
            here = places[begin : begin + batch_size]
            noise = draw_noise(sampler.seed, 0, here, shape, self.device, "pictures")
            cond, uncond = (self._conditions(r, size) for r in (rows, [last] * len(rows)))
            latents = generate(
                network, objective, noise, Guidance(cond, uncond, self.guide), sampler, here
            )
            pictures.append(self.codec.decode(latents).cpu())
        return torch.cat(pictures)


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


def drawer(trained: Trained, device: torch.device) -> Draw:
    """Draws requests, whose prompts it encodes as they come."""
    encoders, objective = trained.encoders(device), Objective(trained.config.objective)
    network, guide = trained.network(device), trained.guide and trained.guide.network(device)

    def draw(requests: list[Request]) -> Tensor:
        painter = Painter(encoders, [r.prompt for r in requests], trained.config.model.num_classes)
        painter.guide = guide
        places, sampler, size = [r.place for r in requests], requests[0].sampler, requests[0].size
        return painter.draw(network, objective, sampler, size, places, len(requests))

    return draw


def largest_bucket(manifest: Manifest) -> tuple[int, int]:
    """Height and width of the bucket with the most samples."""
    bucket = max(manifest.buckets, key=lambda b: b.num_samples)
    return bucket.height, bucket.width
