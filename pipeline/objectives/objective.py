"""What the network learns: predictions, weightings and losses, all through a path's alpha_t and sigma_t.

SNR = alpha_t^2 / sigma_t^2. All of it is fp32 whatever the network's dtype. Module `paths` has the paths, `timesteps`
the distributions of t, `config` the weightings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.randomness import make_generator
from pipeline.objectives.config import ObjectiveConfig, PseudoHuber, Task, Unweighted
from pipeline.objectives.paths import EDM
from pipeline.objectives.timesteps import Shift

Latents = Float[Tensor, "B C h w"]
PerSample = Float[Tensor, " B"]


class Prediction(NamedTuple):
    """Coefficients (B,) of what a network predicts, and of x0 and noise as x_t and the prediction imply them.

    pred = target_x0 x0 + target_noise noise; x0 = x0_x x_t + x0_p pred; noise = noise_x x_t + noise_p pred.
    """

    target_x0: Tensor
    target_noise: Tensor
    x0_x: Tensor
    x0_p: Tensor
    noise_x: Tensor
    noise_p: Tensor


def prediction_coefficients(task: Task, alpha: Tensor, sigma: Tensor) -> Prediction:
    """The coefficients of a task's prediction, for any alpha and sigma."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if task.prediction == "sample":
        return Prediction(one, zero, zero, one, 1 / sigma, -alpha / sigma)
    if isinstance(task.path, EDM) and task.prediction == "edm":
        sigma_data = task.path.sigma_data
        # Karras 2206.00364, eq. 7 with Table 1; alpha and sigma include c_in already.
        root = (alpha**2 * sigma_data**2 + sigma**2).sqrt()
        signal = alpha * sigma_data / root
        x0_x, x0_p = signal * sigma_data / root, sigma * sigma_data / root
        return Prediction(sigma / sigma_data / root, -signal, x0_x, x0_p, sigma / root**2, -signal)
    # v is that of Salimans & Ho 2202.00512.
    x0, noise = {"epsilon": (zero, one), "v": (-sigma, alpha), "flow": (-one, one)}[task.prediction]
    # x_t and pred are two equations of x0 and noise; total is 1 for v on a VP path, for flow on the straight one.
    total = alpha * noise - sigma * x0
    return Prediction(x0, noise, noise / total, -sigma / total, (zero - x0) / total, alpha / total)


class LossTerms(NamedTuple):
    """The figures of each sample, fp32 (B,), by the names under which training logs them."""

    loss: PerSample
    """Weighted loss."""
    x0_mse: PerSample
    """Mean squared error of the x0 that the prediction implies."""


def alignment_loss(
    projection: Float[Tensor, "B N V"], features: Float[Tensor, "B V g j"]
) -> PerSample:
    """1 - cosine similarity, averaged over patches (REPA 2410.06940, eq. 8, which leaves out the 1)."""
    features = features.flatten(2).transpose(1, 2).float()  # (B, N, V), row by row like the patches
    return 1 - F.cosine_similarity(projection.float(), features, dim=-1).mean(dim=1)


class Objective:
    """One configured objective: draws t, makes x_t, converts predictions, computes the loss."""

    def __init__(self, config: ObjectiveConfig):
        self.config = config

    def draw_t(
        self, seed: int, step: int, batch_size: int, latent_size: tuple[int, ...]
    ) -> PerSample:
        """t of the whole global batch, stratified; a pure function of (seed, step) for latents of a size (C, h, w).

        C may be left out but for a shift by dimension.
        """
        config = self.config
        generator = make_generator(seed, "timestep", step)
        u = (generator.permutation(batch_size) + generator.random(batch_size)) / batch_size
        t = config.timesteps.quantile(u, config.path)
        if config.shift is not None:
            t = config.path.shift(t, config.shift.factor(latent_size))
        if config.uniform_fraction > 0:
            t = np.where(generator.random(batch_size) < config.uniform_fraction, u, t)
        return torch.from_numpy(config.path.snap(t)).float()

    def sampling_times(
        self, num_steps: int, latent_size: tuple[int, ...], shift: Shift | None = None
    ) -> Float[Tensor, " n"]:
        """The t at which a sampler calls the network, noisiest first, moved by `shift`, or as in training."""
        t, path = self.config.path.sampling_times(num_steps), self.config.path
        shift = shift or self.config.shift
        if shift is not None:
            t = path.shift(t, shift.factor(latent_size))
        return torch.from_numpy(t).float()

    def alpha_sigma(self, t: PerSample) -> tuple[PerSample, PerSample]:
        """alpha_t and sigma_t, fp32."""
        return self.config.path.alpha_sigma(t.float())

    def add_noise(self, latents: Latents, noise: Latents, t: PerSample) -> Latents:
        """x_t = alpha_t latents + sigma_t noise, fp32; the network's input needs no further scaling."""
        alpha, sigma = self.alpha_sigma(t)
        return combine(alpha, latents, sigma, noise)

    def called(
        self, network: Callable[..., Any], x_t: Latents, t: PerSample, conditions: Any
    ) -> Any:
        """What `network` answers for x_t at t, in the terms of this objective whatever its own are.

        It is called with x_t scaled to its own path, at the t of its path with the same SNR or the nearest, and
        its prediction is converted, in fp32; what it returns beside the prediction is passed on.
        """
        if (own := self.config.network) is None:
            return network(x_t, t, conditions)
        alpha, sigma = self.alpha_sigma(t)
        own_t, a, s = own.path.nearest(alpha, sigma)
        x = x_t.float() * expand(a.hypot(s) / alpha.hypot(sigma), x_t)
        answer = network(x, own_t, conditions)
        pred, *rest = answer if isinstance(answer, tuple) else (answer,)
        # Of a clean x_t, the noise is a limit.
        c = prediction_coefficients(own, a, s.clamp_min(1e-8))
        to_x0, to_noise = self._coefficients(t)[:2]
        of_x = to_x0 * c.x0_x + to_noise * c.noise_x
        pred = combine(of_x, x, to_x0 * c.x0_p + to_noise * c.noise_p, pred)
        return (pred, *rest) if rest else pred

    def share_beyond(self, t: PerSample) -> float:
        """The share of t whose noise level the network's own path lacks."""
        alpha, sigma = self.alpha_sigma(t)
        _, a, s = self.config.own.path.nearest(alpha, sigma)
        sine = (a * sigma - s * alpha) / a.hypot(s) / alpha.hypot(sigma)
        return float((sine.abs() > 1e-5).float().mean())

    def target(self, latents: Latents, noise: Latents, t: PerSample) -> Latents:
        """What the network is to predict, fp32."""
        c = self._coefficients(t)
        return combine(c.target_x0, latents, c.target_noise, noise)

    def to_velocity(self, pred: Latents, x_t: Latents, t: PerSample) -> Latents:
        """The velocity, noise - x0, that a prediction implies."""
        c = self._coefficients(t)
        return combine(c.noise_x - c.x0_x, x_t, c.noise_p - c.x0_p, pred)

    def weight(self, t: PerSample) -> PerSample:
        """Weight on the squared error of the prediction, fp32."""
        weighting = self.config.weighting
        if isinstance(weighting, Unweighted):
            return torch.ones_like(t, dtype=torch.float32)
        alpha, sigma = self.alpha_sigma(t)
        # At both ends the weight is a limit: the clamp avoids 0/0 and is within 1e-8 of exact elsewhere.
        a, s = alpha.clamp_min(1e-8), sigma.clamp_min(1e-8)
        c = prediction_coefficients(self.config, a, s)
        weight = weighting.numerator(a, s) * (c.x0_p / s) ** 2
        return torch.where(alpha == 0, weighting.terminal_weight, weight)

    def x0_weight(self, t: PerSample) -> PerSample:
        """Weight on the squared error of x0 that is equal to `weight`, infinite where sigma is 0."""
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

    def _coefficients(self, t: Tensor) -> Prediction:
        return prediction_coefficients(self.config, *self.alpha_sigma(t))


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y in fp32, with coefficients (B,)."""
    return expand(a, x) * x.float() + expand(b, y) * y.float()


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) to multiply `like`."""
    return coefficient.view(-1, *[1] * (like.ndim - 1))
