"""The frozen latent codec: pictures to latent moments and back. The only home of scale and shift."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.numerics import tf32
from models.weights import (
    CODECS,
    EncoderDtype,
    Normalisation,
    downscale_of,
    load_network,
    read_codec_config,
    weights_sha256,
)


class LatentCodec:
    """A diffusers autoencoder in a local folder, frozen.

    `moments` are raw: (B, 2C, h, w), mean then std, or (B, C, h, w) where `deterministic`. `latents` are
    normalised: (raw - mean) / std. h = H / downscale.
    """

    def __init__(self, network: Any, path: Path, dtype: EncoderDtype, deterministic: bool):
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.path, self.dtype, self.deterministic = path, dtype, deterministic
        self.channels: int = network.config.latent_channels
        config = network.config
        mean = float(config.get("shift_factor") or 0.0)
        std = 1.0 / float(config.get("scaling_factor") or 1.0)
        self.normalisation = Normalisation(mean=(mean,) * self.channels, std=(std,) * self.channels)
        self.downscale = downscale_of(config)

    @classmethod
    def load(
        cls, path: str | Path, dtype: EncoderDtype = "fp32", device: str | torch.device = "cpu"
    ) -> "LatentCodec":
        """Open a folder with config.json and safetensors; raises InputError if it is not a whole codec."""
        path = Path(path)
        name = read_codec_config(path, dtype)["_class_name"]
        network = load_network("diffusers", name, path, dtype)
        return cls(network.to(device), path, dtype, CODECS[name])

    @torch.inference_mode()
    def encode_moments(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B M h w"]:
        """Pictures to raw fp32 moments; M = 2C, or C where deterministic; H and W multiples of `downscale`."""
        if any(side % self.downscale for side in images.shape[2:]):
            raise ValueError(f"images {tuple(images.shape)}: sides must divide by {self.downscale}")
        pixels = images.to(self.network.device).float() / 127.5 - 1
        pixels = pixels.to(self.network.dtype, memory_format=torch.channels_last)
        with tf32(self.dtype == "tf32"):
            output = self.network.encode(pixels)
        if self.deterministic:
            latent = output.latent if hasattr(output, "latent") else output.latents
            return latent.float().contiguous()
        posterior = output.latent_dist
        std = torch.exp(0.5 * posterior.logvar.float())
        return torch.cat([posterior.mean.float(), std], dim=1).contiguous()  # (B, 2C, h, w)

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B 3 H W"]:
        """Normalised latents to pictures."""
        mean, scale = _mean_and_scale(
            self.normalisation.mean, self.normalisation.std, self.network.device
        )
        raw = latents.to(self.network.device).float() / scale + mean
        raw = raw.to(self.network.dtype, memory_format=torch.channels_last)
        with tf32(self.dtype == "tf32"):
            return to_uint8(self.network.decode(raw).sample)

    def decode_mean(self, moments: Float[Tensor, "B M h w"]) -> UInt8[Tensor, "B 3 H W"]:
        """Raw moments to pictures, without the noise of their std."""
        still = torch.zeros_like(moments[:, : self.channels])
        return self.decode(sample_latents(moments, still, self.normalisation))

    def record(self) -> dict[str, Any]:
        """The fields of the CodecRecord that a dataset made with this codec has."""
        return {
            "class_name": type(self.network).__name__,
            "path": str(self.path),
            "weights_sha256": weights_sha256(self.path),
            "dtype": self.dtype,
            "channels": self.channels,
            "downscale": self.downscale,
            "deterministic": self.deterministic,
            "normalisation": self.normalisation,
        }


def sample_latents(
    moments: Float[Tensor, "B M h w"],
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
