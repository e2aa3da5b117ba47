"""What a network is told of the pictures that it predicts, whatever its architecture."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Conditions(NamedTuple):
    """What a network is told of each picture; None where the dataset has none, or the network takes none."""

    text_emb: Tensor | None = None  # (B, L, E), text encoders one after another
    text_mask: Tensor | None = None  # bool (B, L), True keeps; None: all tokens count
    pooled: Tensor | None = None  # (B, P), text encoders side by side
    micro: Tensor | None = None  # (B, 4), original height and width, crop top and left
    label: Tensor | None = None  # int64 (B,); the number of classes stands for none of them
    # (B, M), one per patch: the lowest choose those that `routing` or `masking` keeps; None: all are
    token_scores: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditions":
        """The function's result in place of each tensor that is there."""
        return Conditions(*(None if value is None else function(value) for value in self))


def check_shapes(
    x_t: Float[Tensor, "B C h w"],
    t: Float[Tensor, " B"],
    text_emb: Float[Tensor, "B L E"] | None,
    text_mask: Bool[Tensor, "B L"] | None,
    pooled: Float[Tensor, "B P"] | None,
    micro: Float[Tensor, "B 4"] | None,
    label: Int[Tensor, " B"] | None,
    token_scores: Float[Tensor, "B M"] | None,
) -> None:
    """Does nothing: under pytest this signature is checked, and with it that all are of as many pictures."""


def given(name: str, value: Tensor | None) -> Tensor:
    """The value; raises ValueError where a condition that the network was built for is left out."""
    if value is None:
        raise ValueError(f"{name}: got None; this model was built to be conditioned on it")
    return value


def example_conditions(
    config: Any, batch: int, latent_size: tuple[int, int], text_length: int
) -> Conditions:
    """Zeros of every shape that a network of this config takes, on torch's default device and dtype."""
    num_patches = latent_size[0] * latent_size[1] // config.latent_multiple**2
    routed = getattr(config, "span", None) is not None
    return Conditions(
        text_emb=torch.zeros(batch, text_length, config.text_dim) if config.text_dim else None,
        text_mask=torch.ones(batch, text_length, dtype=torch.bool) if config.text_dim else None,
        pooled=torch.zeros(batch, config.pooled_dim) if config.pooled_dim else None,
        micro=torch.zeros(batch, 4, dtype=torch.float32),
        label=torch.zeros(batch, dtype=torch.long),
        token_scores=torch.zeros(batch, num_patches, dtype=torch.float32) if routed else None,
    )
