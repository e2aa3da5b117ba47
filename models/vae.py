"""The frozen latent codec: pictures to latent moments and back. The only home of scale and shift."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from models import weights
from models.codec_layouts import LAYOUTS, PIXELS, Layout, Normalisation
from models.config import InputError
from models.numerics import tf32


class LatentCodec:
    """A diffusers autoencoder in a local folder, frozen; or pictures as they are, without a network.

    `moments` are raw: (B, 2C, h, w), mean then std, or (B, C, h, w) where deterministic. `latents` are
    normalised: (raw - mean) / std. h = H / downscale. `path` is of a folder with config.json and safetensors, None of
    pixels; raises InputError if it is not whole.
    """

    def __init__(
        self,
        path: str | Path | None,
        dtype: weights.EncoderDtype = "fp32",
        device: str | torch.device = "cpu",
    ):
        name, network, self.device = PIXELS, None, torch.device(device)
        self.dtype, self.memory_format = torch.float32, torch.preserve_format
        if path is not None:
            name = weights.read_codec_config(Path(path), dtype)["_class_name"]
            network = weights.load_network("diffusers", name, Path(path), dtype).to(self.device)
            self.dtype = network.dtype
            # torch lays out images so, and not a video's five dimensions.
            if all(p.ndim < 5 for p in network.parameters()):
                self.memory_format = torch.channels_last
            network.to(memory_format=self.memory_format)
        self.network: Any = network
        self.layout: Layout = LAYOUTS[name]({} if network is None else network.config)
        self.channels, self.downscale = self.layout.channels, self.layout.downscale
        self.deterministic = self.layout.deterministic
        mean, std = self.layout.mean_std(partial(weights.stored_values, Path(path or "")))
        if {len(mean), len(std)} != {self.channels}:
            raise InputError(
                f"{path}: got {len(mean)} means and {len(std)} stds of latents, expected {self.channels}"
            )
        self.normalisation = Normalisation(mean=tuple(mean), std=tuple(std))
        self._record = {
            "class_name": name,
            "path": str(path or ""),
            "weights_sha256": "" if path is None else weights.weights_sha256(Path(path)),
            "dtype": dtype,
        }

    @torch.inference_mode()
    def encode_moments(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B M h w"]:
        """Pictures to raw fp32 moments; M = 2C, or C where deterministic; H and W multiples of `downscale`."""
        if any(side % self.downscale for side in images.shape[2:]):
            raise ValueError(f"images {tuple(images.shape)}: sides must divide by {self.downscale}")
        pixels = images.to(self.device).float() / 127.5 - 1
        pixels = pixels.to(self.dtype, memory_format=self.memory_format)
        with tf32(self._record["dtype"] == "tf32"):
            mean, *variance = self.layout.encode(self.network, pixels)
        std = [torch.exp(0.5 * logarithm.float()) for logarithm in variance]
        return torch.cat([mean.float(), *std], dim=1).contiguous()

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B 3 H W"]:
        """Normalised latents to pictures."""
        mean, scale = _mean_and_scale(self.normalisation.mean, self.normalisation.std, self.device)
        raw = latents.to(self.device).float() / scale + mean
        raw = raw.to(self.dtype, memory_format=self.memory_format)
        with tf32(self._record["dtype"] == "tf32"):
            return to_uint8(self.layout.decode(self.network, raw))

    def decode_mean(self, moments: Num[Tensor, "B M h w"]) -> UInt8[Tensor, "B 3 H W"]:
        """Raw moments to pictures, without the noise of their std."""
        still = torch.zeros_like(moments[:, : self.channels], dtype=torch.float32)
        return self.decode(sample_latents(moments, still, self.normalisation))

    def picture(self, moments: np.ndarray) -> np.ndarray:
        """The picture (H, W, 3) uint8 of one sample's moments, at their mean."""
        pixels = self.decode_mean(torch.from_numpy(moments)[None])[0]
        return pixels.cpu().permute(1, 2, 0).numpy()

    def record(self) -> dict[str, Any]:
        """The fields of the CodecRecord that a dataset made with this codec has."""
        own = ("channels", "downscale", "deterministic", "normalisation")
        return self._record | {name: getattr(self, name) for name in own}


def sample_latents(
    moments: Num[Tensor, "B M h w"],
    noise: Float[Tensor, "B C h w"],
    normalisation: Normalisation,
) -> Float[Tensor, "B C h w"]:
    """Normalised fp32 latents, mean + std * noise, where M = 2C.

    M = C where the codec is deterministic; the noise then gives only the shape.
    """
    channels = noise.shape[1]
    if moments.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"moments {tuple(moments.shape)} do not fit noise {tuple(noise.shape)}")
    raw = moments[:, :channels].float()
    if moments.shape[1] == 2 * channels:
        raw = raw + moments[:, channels:].float() * noise.float()
    mean, scale = _mean_and_scale(normalisation.mean, normalisation.std, raw.device)
    return (raw - mean) * scale


@lru_cache
@torch.inference_mode(False)
def _mean_and_scale(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """fp32 mean and 1 / std, (C, 1, 1) each; cached, since every training step needs them.

    A codec's scaling factor s is stored as std = 1 / s and becomes s again here, bit for bit in fp32.
    """
    factors = torch.tensor([mean, [1 / value for value in std]], dtype=torch.float64)
    shift, scale = factors.float().view(2, -1, 1, 1).to(device)
    return shift, scale


def to_uint8(pixels: Float[Tensor, "*dims"]) -> UInt8[Tensor, "*dims"]:
    """Pixels in [-1, 1] of any float type to uint8, rounded to nearest, clipped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()
