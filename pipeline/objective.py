"""Paths, predictions, weightings and timestep distributions, all through alpha_t and sigma_t.

t = 0 is data, t = 1 is noise; x_t = alpha_t latents + sigma_t noise; SNR = alpha_t^2 / sigma_t^2.
Everything here is fp32 whatever the network's dtype; every draw is a pure function of its seed.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor
from torch.nn import functional as F

from models.config import Config, read_yaml

PRESETS = Path(__file__).parent.parent / "configs" / "objectives.yaml"

Latents = Float[Tensor, "B C h w"]
PerSample = Float[Tensor, " B"]

NUM_TIMESTEPS = 1000  # of the discrete paths; the network is given t = k / 1000
MIN_TERMINAL_SNR = 1e-6  # below it, dividing by alpha_t multiplies an error of epsilon by over 1000


# --- draws ----------------------------------------------------------------------------------------


def make_generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Counter-based generator keyed by 128 hashed bits, the same on every machine.

    torch's CPU generator keeps only 32 bits of its seed, so a long run would repeat noise.
    """
    text = "/".join(str(part) for part in (seed, purpose, *counters))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def draw_noise(
    seed: int,
    step: int,
    indices: Iterable[int] | Tensor,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    purpose: str = "noise",
) -> Float[Tensor, "n ..."]:
    """Standard normal fp32; row i is a pure function of (seed, purpose, step, indices[i]).

    `indices` count within the global batch. Drawn on the CPU, so that a GPU sees the same noise.
    """
    rows = [int(i) for i in indices]
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    for row, index in zip(noise, rows, strict=True):
        generator = make_generator(seed, purpose, step, index)
        row[...] = generator.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(noise).to(device)


def draw_dropout(seed: int, step: int, batch_size: int, p: float) -> Bool[Tensor, " B"]:
    """Whose caption the global batch drops, each with probability `p`; a function of (seed, step)."""
    return torch.from_numpy(make_generator(seed, "dropout", step).random(batch_size) < p)


# --- paths ----------------------------------------------------------------------------------------


class RectifiedFlow(Config):
    """Straight line (Liu 2209.03003): alpha 1 - t, sigma t."""

    kind: Literal["rectified_flow"] = "rectified_flow"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def shift(self, t: np.ndarray, a: float) -> np.ndarray:
        """sigma/alpha becomes a sigma/alpha (SD3 2403.03206, eq. 23)."""
        return a * t / (1 + (a - 1) * t)

    def sampling_times(self, num_steps: int) -> np.ndarray:
        return np.linspace(1, 0, num_steps + 1)[:-1]


class VPCosine(Config):
    """Continuous cosine: alpha cos(pi t/2), sigma sin(pi t/2)."""

    kind: Literal["vp_cosine"] = "vp_cosine"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # sin of the complement: fp32 cos(pi/2) is -4e-8, and alpha must end at exactly 0.
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)

    def shift(self, t: np.ndarray, a: float) -> np.ndarray:
        """sigma/alpha becomes a sigma/alpha (Hoogeboom 2301.11093, sec. 3.1)."""
        return 2 / math.pi * np.arctan2(a * np.sin(math.pi / 2 * t), np.sin(math.pi / 2 * (1 - t)))

    def sampling_times(self, num_steps: int) -> np.ndarray:
        return np.linspace(1, 0, num_steps + 1)[:-1]


class VPDiscrete(Config):
    """1000 noise levels (Ho 2006.11239): alpha sqrt(abar_k), sigma sqrt(1 - abar_k), t = k / 1000.

    betas: `scaled_linear` as Stable Diffusion, `linear` as DDPM, `cosine` as Nichol 2102.09672.
    zero_terminal_snr: rescaled so that the last level is noise alone (Lin 2305.08891, Alg. 1).
    """

    kind: Literal["vp_discrete"] = "vp_discrete"
    betas: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    zero_terminal_snr: bool = False

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = vp_table(self.betas, self.zero_terminal_snr, t.device)
        k = (t * NUM_TIMESTEPS).round().long()
        return alpha[k], sigma[k]

    def sampling_times(self, num_steps: int) -> np.ndarray:
        """Trailing levels (Lin 2305.08891, sec. 3.3): the first step is at the noisiest one."""
        k = np.round(np.arange(num_steps, 0, -1) * NUM_TIMESTEPS / num_steps) - 1
        return k / NUM_TIMESTEPS


class EDM(Config):
    """Karras 2206.00364: latents + sigma noise, sigma = sigma_min (sigma_max/sigma_min)^t.

    x_t is that times c_in = (sigma^2 + sigma_data^2)^-1/2, what the network is to see; t is linear
    in c_noise = ln(sigma)/4. sigma_data is the latents' standard deviation.
    """

    kind: Literal["edm"] = "edm"
    sigma_data: PositiveFloat = 1.0
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0

    @model_validator(mode="after")
    def _ordered(self) -> "EDM":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        sigma = torch.exp(low + (high - low) * t)
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return c_in, c_in * sigma

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        return np.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def sampling_times(self, num_steps: int) -> np.ndarray:
        """Eq. 5 with rho 7."""
        low, high = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
        return self.time_of(np.linspace(high, low, num_steps) ** 7)


@cache
def vp_signal(betas: str, zero_terminal_snr: bool) -> np.ndarray:
    """sqrt(abar_k), float64 (1000,)."""
    n = NUM_TIMESTEPS
    if betas == "scaled_linear":
        beta = np.linspace(0.00085**0.5, 0.012**0.5, n) ** 2
    elif betas == "linear":
        beta = np.linspace(1e-4, 0.02, n)
    else:
        abar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    q = np.sqrt(np.cumprod(1 - beta))
    return (q - q[-1]) * q[0] / (q[0] - q[-1]) if zero_terminal_snr else q


@lru_cache(maxsize=16)
def vp_table(betas: str, zero_terminal_snr: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """alpha, sigma of the 1000 levels, fp32 (1000,)."""
    q = vp_signal(betas, zero_terminal_snr)
    alpha, sigma = torch.from_numpy(q).float(), torch.from_numpy(np.sqrt(1 - q**2)).float()
    return alpha.to(device), sigma.to(device)


# --- timestep distributions: each maps u, uniform in (0, 1), to t ----------------------------------


class Uniform(Config):
    kind: Literal["uniform"] = "uniform"

    def quantile(self, u: np.ndarray, path: Config) -> np.ndarray:
        return u


class LogitNormal(Config):
    """sigmoid(mean + std n) (SD3 2403.03206, eq. 19); mean below 0 leans to data."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: PositiveFloat = 1.0

    def quantile(self, u: np.ndarray, path: Config) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.mean + self.std * normal_quantile(u))))


class Mode(Config):
    """1 - u - scale (cos^2(pi u/2) - 1 + u) (SD3 2403.03206, eq. 20); monotone within the bounds."""

    kind: Literal["mode"] = "mode"
    scale: Annotated[float, Field(ge=-1, le=2 / (math.pi - 2))] = 1.29

    def quantile(self, u: np.ndarray, path: Config) -> np.ndarray:
        return 1 - u - self.scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)


class CosMap(Config):
    """1 - 1/(tan(pi u/2) + 1) (SD3 2403.03206, eq. 21): cosine's SNR density on the straight path."""

    kind: Literal["cosmap"] = "cosmap"

    def quantile(self, u: np.ndarray, path: Config) -> np.ndarray:
        sine, cosine = np.sin(math.pi / 2 * u), np.cos(math.pi / 2 * u)
        return sine / (sine + cosine)


class LogNormal(Config):
    """ln sigma normal (Karras 2206.00364, Table 1), cut to [sigma_min, sigma_max]: for the EDM path."""

    kind: Literal["log_normal"] = "log_normal"
    mean: float = -1.2
    std: PositiveFloat = 1.2

    def quantile(self, u: np.ndarray, path: Config) -> np.ndarray:
        assert isinstance(path, EDM)
        ends = [(math.log(s) - self.mean) / self.std for s in (path.sigma_min, path.sigma_max)]
        low, high = (0.5 * math.erfc(-end / math.sqrt(2)) for end in ends)
        n = np.clip(normal_quantile(low + (high - low) * u), ends[0], ends[1])
        return path.time_of(np.exp(self.mean + self.std * n))


def normal_quantile(u: np.ndarray) -> np.ndarray:
    return torch.special.ndtri(torch.from_numpy(u)).numpy()


# --- shift of the noise level ---------------------------------------------------------------------


class ConstantShift(Config):
    """sigma/alpha times `value`."""

    kind: Literal["constant"] = "constant"
    value: PositiveFloat

    def factor(self, latent_size: tuple[int, int]) -> float:
        return self.value


class ResolutionShift(Config):
    """sigma/alpha times sqrt(h w / base_pixels), in latent pixels (SD3 2403.03206, eq. 23)."""

    kind: Literal["resolution"] = "resolution"
    base_pixels: PositiveInt = 1024

    def factor(self, latent_size: tuple[int, int]) -> float:
        return math.sqrt(latent_size[0] * latent_size[1] / self.base_pixels)


class FluxShift(Config):
    """sigma/alpha times e^mu, mu linear in the tokens of 2x2 latent pixels, as FLUX.1's sampler."""

    kind: Literal["flux"] = "flux"
    base_mu: float = 0.5  # at 256 tokens
    max_mu: float = 1.15  # at 4096 tokens

    def factor(self, latent_size: tuple[int, int]) -> float:
        tokens = latent_size[0] * latent_size[1] / 4
        return math.exp(self.base_mu + (self.max_mu - self.base_mu) * (tokens - 256) / (4096 - 256))


# --- weightings: numerator N of the weight N / sigma^2 on the x0 loss --------------------------------


class Unweighted(Config):
    """1 on the prediction as it is."""

    kind: Literal["none"] = "none"


class MinSNR(Config):
    """min(SNR, gamma) on the x0 loss (Hang 2303.09556); `terminal_weight` where SNR is 0."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: PositiveFloat = 5.0
    terminal_weight: NonNegativeFloat = 1.0

    def numerator(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.minimum(alpha**2, self.gamma * sigma**2)


class SoftMinSNR(Config):
    """SNR gamma / (SNR + gamma) on the x0 loss (Crowson 2401.11605); `terminal_weight` where SNR is 0."""

    kind: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: PositiveFloat = 5.0
    terminal_weight: NonNegativeFloat = 1.0

    def numerator(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.gamma * alpha**2 * sigma**2 / (alpha**2 + self.gamma * sigma**2)


class Debiased(Config):
    """sqrt(SNR) on the x0 loss (Yu 2310.08442); `terminal_weight` where SNR is 0."""

    kind: Literal["debiased"] = "debiased"
    terminal_weight: NonNegativeFloat = 1.0

    def numerator(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * sigma


class MSE(Config):
    kind: Literal["mse"] = "mse"


class PseudoHuber(Config):
    """2c (sqrt(e^2 + c^2) - c) an element: e^2 where small against `c`, 2c|e| where large."""

    kind: Literal["pseudo_huber"] = "pseudo_huber"
    c: PositiveFloat = 0.1


# --- the config -----------------------------------------------------------------------------------


def _kind(value: Any) -> Any:
    """`path: edm` is short for `path: {kind: edm}`."""
    return {"kind": value} if isinstance(value, str) else value


Path_ = Annotated[
    Annotated[RectifiedFlow | VPDiscrete | VPCosine | EDM, Field(discriminator="kind")],
    BeforeValidator(_kind),
]
Timesteps = Annotated[
    Annotated[Uniform | LogitNormal | Mode | CosMap | LogNormal, Field(discriminator="kind")],
    BeforeValidator(_kind),
]
Shift = Annotated[
    Annotated[ConstantShift | ResolutionShift | FluxShift, Field(discriminator="kind")],
    BeforeValidator(_kind),
]
Weighting = Annotated[
    Annotated[Unweighted | MinSNR | SoftMinSNR | Debiased, Field(discriminator="kind")],
    BeforeValidator(_kind),
]
Share = Annotated[float, Field(ge=0, lt=1)]
Loss = Annotated[Annotated[MSE | PseudoHuber, Field(discriminator="kind")], BeforeValidator(_kind)]


class ObjectiveConfig(Config):
    """What the network learns. The default is SD3's; `preset: NAME` starts from configs/objectives.yaml."""

    path: Path_ = RectifiedFlow()
    prediction: Literal["epsilon", "v", "sample", "flow", "edm"] = "flow"
    timesteps: Timesteps = LogitNormal()
    shift: Shift | None = None
    uniform_fraction: Share = 0.0  # of samples whose t is uniform instead
    weighting: Weighting = Unweighted()
    loss: Loss = MSE()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        return resolve_preset(data)

    @model_validator(mode="after")
    def _can_learn(self) -> "ObjectiveConfig":
        if reasons := list(self._refusals()):
            raise ValueError("; ".join(reasons))
        return self

    def _refusals(self) -> Iterator[str]:
        """Why this combination is meaningless or cannot be learnt, if it is."""
        path, timesteps, weighting = self.path, self.timesteps, self.weighting
        discrete, edm = isinstance(path, VPDiscrete), isinstance(path, EDM)
        snr = terminal_snr(path)
        if self.prediction == "epsilon" and snr < MIN_TERMINAL_SNR:
            yield (
                f"prediction epsilon on a path that ends at SNR {snr:.1g}: there x_t is the noise itself, so "
                "predicting it teaches nothing, and a sampler divides by alpha = 0. Remedy: v, flow or sample"
            )
        if self.prediction == "edm" and not edm:
            yield f"prediction edm needs sigma_data, which path {path.kind} has not. Remedy: path edm"
        if isinstance(timesteps, LogNormal) and not edm:
            yield (
                f"timesteps log_normal draw sigma, and path {path.kind} is not made of sigma. Remedy: path "
                "edm, or logit_normal (on rectified_flow a log-normal sigma/alpha)"
            )
        if self.shift is not None and discrete:
            yield (
                "shift has no meaning on path vp_discrete, whose noise levels are a fixed table. Remedy: "
                "remove it; betas and zero_terminal_snr say how noisy the path is"
            )
        if self.shift is not None and edm:
            yield "shift has no meaning on path edm, where timesteps.mean says it. Remedy: remove it"
        if self.uniform_fraction > 0 and isinstance(timesteps, Uniform) and self.shift is None:
            yield "uniform_fraction has no effect: every t is uniform already. Remedy: remove it"
        if getattr(weighting, "terminal_weight", 1.0) != 1.0 and not (discrete and snr == 0):
            yield (
                f"weighting.terminal_weight has no effect: no t drawn on path {path.kind} as configured has "
                "SNR 0. Remedy: remove it, or path vp_discrete with zero_terminal_snr"
            )
        if (
            isinstance(weighting, Debiased)
            and self.prediction == "sample"
            and not (discrete or edm)
        ):
            yield (
                f"weighting debiased on prediction sample is alpha/sigma, infinite at t = 0 of path {path.kind}. "
                "Remedy: min_snr, or another prediction"
            )


def terminal_snr(path: RectifiedFlow | VPDiscrete | VPCosine | EDM) -> float:
    """SNR at the noisiest t of a path."""
    last = 1 - 1 / NUM_TIMESTEPS if isinstance(path, VPDiscrete) else 1.0
    alpha, sigma = path.alpha_sigma(torch.tensor([last]))
    return float(alpha / sigma) ** 2


def resolve_preset(data: Any) -> Any:
    """`preset: NAME` plus overrides, as plain data without the key; raises ValueError for no such name."""
    if not isinstance(data, dict) or "preset" not in data:
        return data
    presets = read_yaml(PRESETS, [])
    overrides = {key: value for key, value in data.items() if key != "preset"}
    if data["preset"] not in presets:
        raise ValueError(f"preset {data['preset']!r}: no such name; valid: {', '.join(presets)}")
    merged: dict[str, Any] = dict(presets[data["preset"]])
    for key, value in overrides.items():
        base = merged.get(key)
        if isinstance(value, dict) and base and value.get("kind") in (None, base["kind"]):
            value = {**base, **value}
        merged[key] = value
    return merged


# --- the objective --------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """Linear maps, each coefficient (B,): pred = target_x0 x0 + target_noise noise, and back from x_t and
    pred: x0 = x0_x x_t + x0_p pred, noise = noise_x x_t + noise_p pred.
    """

    target_x0: Tensor
    target_noise: Tensor
    x0_x: Tensor
    x0_p: Tensor
    noise_x: Tensor
    noise_p: Tensor


def prediction_coefficients(
    kind: str, alpha: Tensor, sigma: Tensor, sigma_data: float
) -> Prediction:
    """The linear maps between what a network predicts and (x0, noise), for any alpha and sigma."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "sample":
        return Prediction(one, zero, zero, one, 1 / sigma, -alpha / sigma)
    if kind == "epsilon":
        return Prediction(zero, one, 1 / alpha, -sigma / alpha, zero, one)
    if kind == "v":  # Salimans & Ho 2202.00512; power is 1 on a VP path
        power = alpha**2 + sigma**2
        return Prediction(
            -sigma, alpha, alpha / power, -sigma / power, sigma / power, alpha / power
        )
    if kind == "flow":  # sum is 1 on the straight path
        total = alpha + sigma
        return Prediction(-one, one, 1 / total, -sigma / total, 1 / total, alpha / total)
    # Karras 2206.00364, eq. 7 with Table 1, c_in being within alpha and sigma already.
    root = (alpha**2 * sigma_data**2 + sigma**2).sqrt()
    signal = alpha * sigma_data / root
    x0_x, x0_p = signal * sigma_data / root, sigma * sigma_data / root
    return Prediction(sigma / sigma_data / root, -signal, x0_x, x0_p, sigma / root**2, -signal)


@dataclass(frozen=True)
class LossTerms:
    """Of each sample, fp32 (B,): the weighted loss, and the mean squared error of the x0 it implies."""

    loss: PerSample
    x0_mse: PerSample
    alignment: PerSample | None = None  # 1 - cosine similarity to a vision encoder's features


def alignment_loss(
    projection: Float[Tensor, "B N V"], features: Float[Tensor, "B V g j"]
) -> PerSample:
    """1 - cosine similarity, mean over patches (REPA 2410.06940, eq. 8, which leaves out the 1)."""
    features = features.flatten(2).transpose(1, 2).float()  # (B, N, V), row by row as the patches
    return 1 - F.cosine_similarity(projection.float(), features, dim=-1).mean(dim=1)


class Objective:
    """One configured objective: draws t, makes x_t, converts predictions, computes the loss."""

    def __init__(self, config: ObjectiveConfig):
        self.config = config

    def draw_t(
        self, seed: int, step: int, batch_size: int, latent_size: tuple[int, int]
    ) -> PerSample:
        """t of the whole global batch, stratified; a pure function of (seed, step).

        `latent_size` is (h, w) of the latents, for shifts that depend on resolution.
        """
        config = self.config
        generator = make_generator(seed, "timestep", step)
        u = (generator.permutation(batch_size) + generator.random(batch_size)) / batch_size
        t = config.timesteps.quantile(u, config.path)
        if config.shift is not None:
            assert isinstance(config.path, RectifiedFlow | VPCosine)
            t = config.path.shift(t, config.shift.factor(latent_size))
        if config.uniform_fraction > 0:
            t = np.where(generator.random(batch_size) < config.uniform_fraction, u, t)
        if isinstance(config.path, VPDiscrete):
            t = np.minimum(np.floor(t * NUM_TIMESTEPS), NUM_TIMESTEPS - 1) / NUM_TIMESTEPS
        return torch.from_numpy(t).float()

    def sampling_times(
        self, num_steps: int, latent_size: tuple[int, int], shift: Shift | None = None
    ) -> Float[Tensor, " n"]:
        """The t at which a sampler calls the network, noisiest first, shifted as t is in training.

        `shift` takes the place of the config's.
        """
        t, path = self.config.path.sampling_times(num_steps), self.config.path
        shift = shift or self.config.shift
        if shift is not None and isinstance(path, RectifiedFlow | VPCosine):
            t = path.shift(t, shift.factor(latent_size))
        return torch.from_numpy(t).float()

    def alpha_sigma(self, t: PerSample) -> tuple[PerSample, PerSample]:
        """alpha_t and sigma_t, fp32."""
        return self.config.path.alpha_sigma(t.float())

    def add_noise(self, latents: Latents, noise: Latents, t: PerSample) -> Latents:
        """x_t = alpha_t latents + sigma_t noise, fp32: the network's input as it is."""
        alpha, sigma = self.alpha_sigma(t)
        return combine(alpha, latents, sigma, noise)

    def target(self, latents: Latents, noise: Latents, t: PerSample) -> Latents:
        """What the network is to predict, fp32."""
        c = self._coefficients(t)
        return combine(c.target_x0, latents, c.target_noise, noise)

    def to_x0(self, pred: Latents, x_t: Latents, t: PerSample) -> Latents:
        """The clean latents that a prediction implies."""
        c = self._coefficients(t)
        return combine(c.x0_x, x_t, c.x0_p, pred)

    def to_noise(self, pred: Latents, x_t: Latents, t: PerSample) -> Latents:
        """The noise that a prediction implies."""
        c = self._coefficients(t)
        return combine(c.noise_x, x_t, c.noise_p, pred)

    def to_velocity(self, pred: Latents, x_t: Latents, t: PerSample) -> Latents:
        """noise - x0 that a prediction implies."""
        c = self._coefficients(t)
        return combine(c.noise_x - c.x0_x, x_t, c.noise_p - c.x0_p, pred)

    def weight(self, t: PerSample) -> PerSample:
        """Weight on the squared error of the prediction, fp32."""
        weighting = self.config.weighting
        if isinstance(weighting, Unweighted):
            return torch.ones_like(t, dtype=torch.float32)
        alpha, sigma = self.alpha_sigma(t)
        # Both ends are limits: the clamp keeps 0/0 out and is 1e-8 from exact everywhere else.
        a, s = alpha.clamp_min(1e-8), sigma.clamp_min(1e-8)
        c = prediction_coefficients(self.config.prediction, a, s, self._sigma_data)
        weight = weighting.numerator(a, s) * (c.x0_p / s) ** 2
        return torch.where(alpha == 0, weighting.terminal_weight, weight)

    def x0_weight(self, t: PerSample) -> PerSample:
        """The same weight as a weight on the squared error of x0, infinite where sigma is 0."""
        return self.weight(t) / self._coefficients(t).x0_p ** 2

    def loss(self, pred: Latents, latents: Latents, noise: Latents, t: PerSample) -> LossTerms:
        """Weighted loss of each sample, averaged over its elements, in fp32."""
        squared = (pred.float() - self.target(latents, noise, t)).square()
        distance = squared.flatten(1).mean(1)
        x0_mse = distance.detach() * self._coefficients(t).x0_p ** 2
        if isinstance(self.config.loss, PseudoHuber):
            c = self.config.loss.c
            # Rationalised: sqrt(e^2 + c^2) - c cancels to nothing where e is small.
            distance = (2 * c * squared / ((squared + c**2).sqrt() + c)).flatten(1).mean(1)
        return LossTerms(self.weight(t) * distance, x0_mse)

    @property
    def _sigma_data(self) -> float:
        return self.config.path.sigma_data if isinstance(self.config.path, EDM) else 1.0

    def _coefficients(self, t: Tensor) -> Prediction:
        return prediction_coefficients(
            self.config.prediction, *self.alpha_sigma(t), self._sigma_data
        )


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y in fp32, a coefficient a sample."""
    return expand(a, x) * x.float() + expand(b, y) * y.float()


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) to multiply `like`."""
    return coefficient.view(-1, *[1] * (like.ndim - 1))
