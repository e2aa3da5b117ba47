"""U-ViT (Bao 2209.12152): all conditions are tokens, and long skips join shallow blocks to deep ones.

Positions are fixed sine-cosines, so that any shape of latent works; the paper's are learned for one size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.conditions import Conditions
from models.layers import PatchTransformer, PreNormBlock, Rope, Tokens, Vector, initialise
from models.networks import UViTConfig


class UViT(PatchTransformer):
    """Text- or class-conditioned; its last convolution starts at zero, so an untrained network returns zero."""

    def __init__(self, config: UViTConfig):
        super().__init__(config)
        dim, half = self.dim, self.depth // 2
        self.context_embedder = nn.Linear(config.text_dim, dim) if config.text_dim else None
        self.transformer_blocks = nn.ModuleList(
            PreNormBlock(config, nn.LayerNorm, skip=i > half, qkv_bias=False)
            for i in range(self.depth)
        )
        self.norm_out = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, self.patch_dim)
        channels = self.patch_dim // config.patch_size**2
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        initialise(self, [self.conv_out])

    def transform(
        self, x: Tokens, num: int, rope: Rope, vectors: list[Vector], conditions: Conditions
    ) -> tuple[Float[Tensor, "B M P"], None]:
        text, mask = self.read(self.context_embedder, conditions, x)
        x = torch.cat([x, *(v[:, None] for v in vectors)], dim=1)
        if mask is not None:
            mask = F.pad(mask, (x.shape[1], 0), value=True)
        if text is not None:
            x = torch.cat([x, text], dim=1)  # (B, patches, registers, conditions, text; D)
        x, _ = self.through((x,), num, rope, None, (mask,))
        return self.proj_out(self.norm_out(x)), None

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions = Conditions()) -> Any:
        return self.conv_out(super().forward(x_t, t, conditions))
