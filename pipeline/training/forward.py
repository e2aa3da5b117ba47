"""One micro-batch through the network: random draws, conditions, loss."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from models.layers import kept_pixels
from models.networks import NetworkConfig
from models.vae import sample_latents
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.data.randomness import draw_dropout
from pipeline.objectives.objective import Latents, LossTerms, Objective, PerSample, alignment_loss


class Draws(NamedTuple):
    """Draws for a global batch of B samples; `dropped` ones lose caption and class."""

    t: PerSample
    dropped: Bool[Tensor, " B"]


@dataclass(frozen=True)
class Terms:
    """Losses of a micro-batch: `total` () for backward, `named` for the log, `loss` first."""

    t: PerSample
    total: Tensor
    named: dict[str, PerSample]


class Forward:
    """Sends micro-batches through a network, or DeepSpeed's engine around it; has no state."""

    def __init__(
        self,
        network: Any,
        objective: Objective,
        loader: Loader,
        model: NetworkConfig,
        caption_dropout: float,
        device: torch.device,
    ):
        self.network, self.objective, self.device = network, objective, device
        self.seed, self.global_batch = loader.plan.seed, loader.plan.global_batch
        self.caption_dropout, self.model = caption_dropout, cast(Any, model)
        self.codec, caption = loader.manifest.codec, loader.empty_caption
        self.empty_caption = None if caption is None else caption.to(device)

    def draw(self, step: int, latent_size: tuple[int, int]) -> Draws:
        """Draws of a step, a pure function of the seed and the step."""
        size = (self.codec.channels, *latent_size)
        t = self.objective.draw_t(self.seed, step, self.global_batch, size)
        dropped = draw_dropout(self.seed, step, self.global_batch, self.caption_dropout)
        return Draws(t, dropped)

    def __call__(self, batch: Batch, draws: Draws, images: int) -> Terms:
        """Losses of a micro-batch after `images` pictures."""
        t, dropped = (self._to_device(drawn[batch.indices]) for drawn in draws)
        batch = batch.to(self.device).drop(dropped, self.empty_caption, self.model.num_classes)
        noise, scores = batch.noise, batch.token_scores
        assert noise is not None
        # Where the codec is deterministic, the posterior gives only the shape.
        posterior = noise if batch.posterior is None else batch.posterior
        latents = sample_latents(batch.moments, posterior, self.codec.normalisation)
        x_t = self.objective.add_noise(latents, noise, t)
        pred = self.objective.called(self.network, x_t, t, batch.conditions)
        pred, projection = pred if isinstance(pred, tuple) else (pred, None)
        if scores is None or not self.model.masking:
            terms = self.objective.loss(pred, latents, noise, t)
        else:
            span, patch_size = self.model.span, self.model.patch_size
            kept = kept_pixels(scores, span, patch_size, *latents.shape[-2:])
            terms = loss_of_kept(self.objective, pred, latents, noise, t, kept)
        total, named = terms.loss.mean(), terms._asdict()
        if projection is not None:
            assert batch.vision is not None
            named["alignment"] = alignment_loss(projection, batch.vision)
            total = total + alignment_weight(self.model, images) * named["alignment"].mean()
        return Terms(t, total, {name: value.detach() for name, value in named.items()})

    def _to_device(self, drawn: Tensor) -> Tensor:
        """A small tensor on the device; from memory that is not pinned, the copy would wait for the GPU."""
        pinned = drawn.pin_memory() if self.device.type == "cuda" else drawn
        return pinned.to(self.device, non_blocking=True)


def loss_of_kept(
    objective: Objective,
    pred: Latents,
    latents: Latents,
    noise: Latents,
    t: PerSample,
    kept: Bool[Tensor, "B 1 h w"],
) -> LossTerms:
    """The loss over the pixels that the network kept; dropped pixels have no error."""
    pred = torch.where(kept, pred, objective.target(latents, noise, t))
    share = kept.float().mean()
    return LossTerms(*(term / share for term in objective.loss(pred, latents, noise, t)))


def alignment_weight(model: Any, images: int) -> float:
    """Weight of the alignment loss (REPA 2410.06940) after `images` pictures."""
    alignment = getattr(model, "alignment", None)
    if alignment is None or images >= (alignment.until_images or math.inf):
        return 0.0
    return alignment.weight
