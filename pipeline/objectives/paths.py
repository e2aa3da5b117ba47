"""Paths from data to noise: x_t = alpha_t latents + sigma_t noise, t from 0, data, to 1, noise.

All that the rest of the project asks of a path, its class answers: a new path is a class here and its name in
`Path`. Configs import this module, so it imports torch only when it is given a tensor.
"""

import math
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from models.config import Config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NUM_TIMESTEPS = 1000
"""Levels of the discrete paths; the network is given t = k / 1000."""

SCHEDULES = {
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "linear": ("linear", 1e-4, 0.02),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}
"""diffusers' beta_schedule, beta_start and beta_end by the name of ours; the last has no use for the ends."""


def named(value: Any) -> Any:
    """{kind: NAME} for NAME, so that `path: edm` is short for `path: {kind: edm}`."""
    return {"kind": value} if isinstance(value, str) else value


OneOf = TypeVar("OneOf")
ByKind = Annotated[OneOf, Field(discriminator="kind"), BeforeValidator(named)]
"""One of several configs, which its `kind` or its name alone tells."""


class NoisePath(Config):
    """What every path answers; most are continuous and assume latents of variance 1."""

    kind: Any
    discrete: ClassVar[bool] = False
    """Whether t is one of k / NUM_TIMESTEPS."""
    shiftable: ClassVar[bool] = False
    """Whether `shift` is defined."""

    @property
    def sigma_range(self) -> tuple[float, float] | None:
        """The least and the largest sigma/alpha, where the path defines `time_of`; else None."""
        return None

    def alpha_sigma(self, t: "Tensor") -> "tuple[Tensor, Tensor]":
        """alpha_t and sigma_t, of t's shape."""
        raise NotImplementedError

    def sampling_times(self, num_steps: int) -> np.ndarray:
        """The t at which a sampler calls the network, noisiest first; here evenly spaced from 1."""
        return np.linspace(1, 0, num_steps + 1)[:-1]

    def shift(self, t: np.ndarray, a: float) -> np.ndarray:
        """The t whose sigma/alpha is a times that of the one given."""
        raise NotImplementedError

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        """The t at which sigma/alpha has this value."""
        raise NotImplementedError

    def nearest(self, alpha: "Tensor", sigma: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
        """t, alpha and sigma, each (B,), at the path's noise level whose sigma/alpha is nearest to the one given."""
        raise NotImplementedError

    def snap(self, t: np.ndarray) -> np.ndarray:
        """The largest t of the path that is not above the one given."""
        return t

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma, each at the cleanest t and at the noisiest; here from pure data to pure noise."""
        return np.array([1.0, 0.0]), np.array([0.0, 1.0])


class RectifiedFlow(NoisePath):
    """Straight line (Liu 2209.03003): alpha 1 - t, sigma t."""

    kind: Literal["rectified_flow"] = "rectified_flow"
    shiftable: ClassVar[bool] = True

    def alpha_sigma(self, t: "Tensor") -> "tuple[Tensor, Tensor]":
        return 1 - t, t

    def shift(self, t: np.ndarray, a: float) -> np.ndarray:
        """SD3 2403.03206, eq. 23."""
        return a * t / (1 + (a - 1) * t)

    def nearest(self, alpha: "Tensor", sigma: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
        t = sigma / (alpha + sigma)
        return t, alpha / (alpha + sigma), t


class VPCosine(NoisePath):
    """Continuous cosine: alpha cos(pi t/2), sigma sin(pi t/2)."""

    kind: Literal["vp_cosine"] = "vp_cosine"
    shiftable: ClassVar[bool] = True

    def alpha_sigma(self, t: "Tensor") -> "tuple[Tensor, Tensor]":
        # sin of the complement: fp32 cos(pi/2) is -4e-8, and alpha must end at exactly 0.
        return (math.pi / 2 * (1 - t)).sin(), (math.pi / 2 * t).sin()

    def shift(self, t: np.ndarray, a: float) -> np.ndarray:
        """Hoogeboom 2301.11093, sec. 3.1."""
        return 2 / math.pi * np.arctan2(a * np.sin(math.pi / 2 * t), np.sin(math.pi / 2 * (1 - t)))

    def nearest(self, alpha: "Tensor", sigma: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
        norm = alpha.hypot(sigma)
        return 2 / math.pi * sigma.atan2(alpha), alpha / norm, sigma / norm


class VPDiscrete(NoisePath):
    """1000 noise levels (Ho 2006.11239): alpha sqrt(abar_k), sigma sqrt(1 - abar_k), t = k / 1000."""

    kind: Literal["vp_discrete"] = "vp_discrete"
    discrete: ClassVar[bool] = True
    betas: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    """Stable Diffusion's, DDPM's or those of Nichol 2102.09672."""
    zero_terminal_snr: bool = False
    """Rescale them so that the last level is pure noise (Lin 2305.08891, Alg. 1)."""

    def alpha_sigma(self, t: "Tensor") -> "tuple[Tensor, Tensor]":
        alpha, sigma = vp_table(self.betas, self.zero_terminal_snr, t.device)
        k = (t * NUM_TIMESTEPS).round().long()
        return alpha[k], sigma[k]

    def sampling_times(self, num_steps: int) -> np.ndarray:
        """Trailing levels (Lin 2305.08891, sec. 3.3): the first step is at the noisiest one."""
        k = np.round(np.arange(num_steps, 0, -1) * NUM_TIMESTEPS / num_steps) - 1
        return k / NUM_TIMESTEPS

    def nearest(self, alpha: "Tensor", sigma: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
        """A t between two levels is linear in ln(sigma/alpha), as k-diffusion's; embeddings of time are smooth in it."""
        import torch

        alphas, sigmas = vp_table(self.betas, self.zero_terminal_snr, alpha.device)
        # The floor stands for SNR 0.
        levels, level = (
            (s / a.clamp_min(1e-6)).log() for a, s in ((alphas, sigmas), (alpha, sigma))
        )
        above = torch.searchsorted(levels, level).clamp(1, NUM_TIMESTEPS - 1)
        low, high = levels[above - 1], levels[above]
        k = above - 1 + ((level - low) / (high - low)).clamp(0, 1)
        # Rounding of fp32 moves a level by less than this.
        k = torch.where((k - k.round()).abs() < 1e-4, k.round(), k)
        alpha, sigma = alpha / alpha.hypot(sigma), sigma / alpha.hypot(sigma)
        alpha = alpha.clamp(alphas[-1], alphas[0])
        return k / NUM_TIMESTEPS, alpha, sigma.clamp(sigmas[0], sigmas[-1])

    def snap(self, t: np.ndarray) -> np.ndarray:
        return np.minimum(np.floor(t * NUM_TIMESTEPS), NUM_TIMESTEPS - 1) / NUM_TIMESTEPS

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        alpha = vp_signal(self.betas, self.zero_terminal_snr)[[0, -1]]
        return alpha, np.sqrt(1 - alpha**2)


class EDM(NoisePath):
    """Karras 2206.00364: latents + sigma noise, sigma = sigma_min (sigma_max/sigma_min)^t.

    x_t is that times c_in = (sigma^2 + sigma_data^2)^-1/2, as the network is to see it; t is linear
    in c_noise = ln(sigma)/4.
    """

    kind: Literal["edm"] = "edm"
    sigma_data: PositiveFloat = 1.0
    """Standard deviation of the latents."""
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0

    @model_validator(mode="after")
    def _ordered(self) -> "EDM":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def alpha_sigma(self, t: "Tensor") -> "tuple[Tensor, Tensor]":
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        sigma = (low + (high - low) * t).exp()
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return c_in, c_in * sigma

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        sigma = np.array(self.sigma_range)
        c_in = (sigma**2 + self.sigma_data**2) ** -0.5
        return c_in, c_in * sigma

    def nearest(self, alpha: "Tensor", sigma: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
        ratio = (sigma / alpha).clamp(*self.sigma_range)
        t = (ratio / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)
        c_in = (ratio**2 + self.sigma_data**2).rsqrt()
        return t, c_in, c_in * ratio

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        return np.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def sampling_times(self, num_steps: int) -> np.ndarray:
        """Eq. 5 with rho 7."""
        low, high = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
        return self.time_of(np.linspace(high, low, num_steps) ** 7)


Path = ByKind[RectifiedFlow | VPDiscrete | VPCosine | EDM]


@cache
def vp_signal(betas: str, zero_terminal_snr: bool) -> np.ndarray:
    """sqrt(abar_k), float64 (1000,)."""
    n, (_, first, last) = NUM_TIMESTEPS, SCHEDULES[betas]
    if betas == "scaled_linear":
        beta = np.linspace(first**0.5, last**0.5, n) ** 2
    elif betas == "linear":
        beta = np.linspace(first, last, n)
    else:
        abar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    q = np.sqrt(np.cumprod(1 - beta))
    return (q - q[-1]) * q[0] / (q[0] - q[-1]) if zero_terminal_snr else q


@lru_cache(maxsize=16)
def vp_table(
    betas: str, zero_terminal_snr: bool, device: "torch.device"
) -> "tuple[Tensor, Tensor]":
    """alpha, sigma of the 1000 levels, fp32 (1000,)."""
    import torch

    q = vp_signal(betas, zero_terminal_snr)
    alpha, sigma = torch.from_numpy(q).float(), torch.from_numpy(np.sqrt(1 - q**2)).float()
    return alpha.to(device), sigma.to(device)
