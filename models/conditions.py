"""What a network is told of the pictures that it predicts, whatever its architecture."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Conditions(NamedTuple):
    """What a network is told of each picture; None where the dataset has none, or the network takes none."""

    text_emb: Float[Tensor, "B L E"] | None = None
    """Tokens of the text encoders, one encoder after another."""
    text_mask: Bool[Tensor, "B L"] | None = None
    """True keeps a token; None keeps all."""
    pooled: Float[Tensor, "B P"] | None = None
    """Vectors of the text encoders, side by side."""
    micro: Float[Tensor, "B 4"] | None = None
    """Original height and width, top and left of the crop."""
    label: Int[Tensor, " B"] | None = None
    """Class; the number of classes stands for no class."""
    token_scores: Float[Tensor, "B M"] | None = None
    """Score of each patch: `routing` and `masking` keep the lowest; None keeps all."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditions":
        """The function's result in place of each tensor that is there."""
        return Conditions(*(None if value is None else function(value) for value in self))

    def drawn(self, count: int, size: tuple[int, int], device: torch.device) -> "Conditions":
        """What is told beside captions and classes of `count` pictures that are drawn at `size` (height, width)."""
        micro = torch.tensor([[*size, 0.0, 0.0]], device=device).expand(count, 4)
        return self._replace(micro=micro)


Fields: Any = tuple[tuple(Conditions.__annotations__.values())]


def check_inputs(
    x_t: Float[Tensor, "B C h w"],
    t: Float[Tensor, " B"],
    conditions: Fields,  # pyright: ignore[reportInvalidTypeForm]
) -> None:
    """Raises TypeError where t is not fp32; under pytest, also where shapes of inputs disagree."""
    if t.dtype != torch.float32:
        raise TypeError(f"t: got {t.dtype}, expected torch.float32: lower precision loses time")


def given(name: str, value: Tensor | None) -> Tensor:
    """The value of a condition that the network was built for; raises ValueError where there is none."""
    if value is None:
        raise ValueError(f"{name}: got None; this model was built to be conditioned on it")
    return value


def example_conditions(
    config: Any, batch: int, latent_size: tuple[int, int], text_length: int
) -> Conditions:
    """Zeros, or ones, in the shapes that a network of this config takes; on torch's default device and dtype."""
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
