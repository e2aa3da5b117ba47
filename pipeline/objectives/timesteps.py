"""The t that training draws: distributions, each a map of u, uniform in (0, 1), and shifts of the noise level."""

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from models.config import Config
from pipeline.objectives.paths import ByKind, NoisePath


class Uniform(Config):
    kind: Literal["uniform"] = "uniform"

    def quantile(self, u: np.ndarray, path: NoisePath) -> np.ndarray:
        return u


class LogitNormal(Config):
    """sigmoid(mean + std n) (SD3 2403.03206, eq. 19); a mean below 0 leans to data."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: PositiveFloat = 1.0

    def quantile(self, u: np.ndarray, path: NoisePath) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.mean + self.std * normal_quantile(u))))


class Mode(Config):
    """1 - u - scale (cos^2(pi u/2) - 1 + u) (SD3 2403.03206, eq. 20); monotone within the bounds."""

    kind: Literal["mode"] = "mode"
    scale: Annotated[float, Field(ge=-1, le=2 / (math.pi - 2))] = 1.29

    def quantile(self, u: np.ndarray, path: NoisePath) -> np.ndarray:
        return 1 - u - self.scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)


class CosMap(Config):
    """1 - 1/(tan(pi u/2) + 1) (SD3 2403.03206, eq. 21): cosine's SNR density on the straight path."""

    kind: Literal["cosmap"] = "cosmap"

    def quantile(self, u: np.ndarray, path: NoisePath) -> np.ndarray:
        sine, cosine = np.sin(math.pi / 2 * u), np.cos(math.pi / 2 * u)
        return sine / (sine + cosine)


class LogNormal(Config):
    """ln sigma is normal (Karras 2206.00364, Table 1), cut to the path's sigmas; only EDM's has such."""

    kind: Literal["log_normal"] = "log_normal"
    mean: float = -1.2
    std: PositiveFloat = 1.2

    def quantile(self, u: np.ndarray, path: NoisePath) -> np.ndarray:
        assert path.sigma_range is not None
        ends = [(math.log(s) - self.mean) / self.std for s in path.sigma_range]
        low, high = (0.5 * math.erfc(-end / math.sqrt(2)) for end in ends)
        n = np.clip(normal_quantile(low + (high - low) * u), ends[0], ends[1])
        return path.time_of(np.exp(self.mean + self.std * n))


def normal_quantile(u: np.ndarray) -> np.ndarray:
    import torch  # late, since configs import this module

    return torch.special.ndtri(torch.from_numpy(u)).numpy()


class ConstantShift(Config):
    """sigma/alpha times `value`."""

    kind: Literal["constant"] = "constant"
    value: PositiveFloat

    def factor(self, latent_size: tuple[int, ...]) -> float:
        return self.value


class ResolutionShift(Config):
    """sigma/alpha times sqrt(h w / base_pixels), in latent pixels (SD3 2403.03206, eq. 23)."""

    kind: Literal["resolution"] = "resolution"
    base_pixels: PositiveInt = 1024

    def factor(self, latent_size: tuple[int, ...]) -> float:
        return math.sqrt(math.prod(latent_size[-2:]) / self.base_pixels)


class DimensionShift(Config):
    """sigma/alpha times sqrt(C h w / base_elements): by all that noise must hide (RAE 2510.11690, 2601.16208)."""

    kind: Literal["dimension"] = "dimension"
    base_elements: PositiveInt = 4096

    def factor(self, latent_size: tuple[int, ...]) -> float:
        channels, height, width = latent_size
        return math.sqrt(channels * height * width / self.base_elements)


class FluxShift(Config):
    """sigma/alpha times e^mu, mu linear in the number of tokens of 2x2 latent pixels, as in FLUX.1's sampler."""

    kind: Literal["flux"] = "flux"
    base_mu: float = 0.5
    """mu at 256 tokens."""
    max_mu: float = 1.15
    """mu at 4096 tokens."""

    def factor(self, latent_size: tuple[int, ...]) -> float:
        tokens = math.prod(latent_size[-2:]) / 4
        return math.exp(self.base_mu + (self.max_mu - self.base_mu) * (tokens - 256) / (4096 - 256))


Timesteps = ByKind[Uniform | LogitNormal | Mode | CosMap | LogNormal]
Shift = ByKind[ConstantShift | ResolutionShift | DimensionShift | FluxShift]
