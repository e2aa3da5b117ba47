"""U-ViT (Bao 2209.12152): all conditions are tokens, and long skips join shallow blocks to deep ones.

Positions are fixed sine-cosines, so that any shape of latent works; the paper's are learned for one size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.conditions import Conditions, given
from models.layers import (
    Attention,
    AttentionFunction,
    FeedForward,
    LongSkips,
    Mask,
    PatchTransformer,
    Rope,
    Tokens,
    Vector,
    initialise,
)
from models.networks import UViTConfig


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP; with `skip`, a linear first merges the long skip, which lies beside x."""

    def __init__(self, config: UViTConfig, skip: bool):
        super().__init__()
        dim, _, heads = config.shape()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qk_norm=config.qk_norm, qkv_bias=False)
        self.ff = FeedForward(dim, int(dim * config.mlp_ratio))

    def forward(
        self, x: Float[Tensor, "B N _"], mask: Mask, rope: Rope, attend: AttentionFunction
    ) -> Tokens:
        if self.skip_linear is not None:
            x = self.skip_linear(x)
        x = x + self.attn(self.norm1(x), attend, mask=mask, rope=rope)
        return x + self.ff(self.norm2(x))


class UViT(PatchTransformer):
    """Text- or class-conditioned; its last convolution starts at zero, so an untrained network returns zero."""

    def __init__(self, config: UViTConfig):
        super().__init__(config)
        dim, self.config = self.dim, config
        self.context_embedder = nn.Linear(config.text_dim, dim) if config.text_dim else None
        half = self.depth // 2
        self.transformer_blocks = nn.ModuleList(
            UViTBlock(config, skip=i > half) for i in range(self.depth)
        )
        self.norm_out = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, self.patch_dim)
        channels = self.patch_dim // config.patch_size**2
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        initialise(self, [self.conv_out])

    def transform(
        self, x: Tokens, rope: Rope, vectors: list[Vector], conditions: Conditions
    ) -> tuple[Float[Tensor, "B M P"], None]:
        num, mask = x.shape[1] - self.config.register_tokens, None
        x = torch.cat([x, *(v[:, None] for v in vectors)], dim=1)
        if self.context_embedder is not None:
            text = self.context_embedder(given("text_emb", conditions.text_emb).to(x.dtype))
            if conditions.text_mask is not None:
                mask = F.pad(conditions.text_mask, (x.shape[1], 0), value=True)[:, None, None]
            x = torch.cat([x, text], dim=1)  # (B, patches, registers, conditions, text; D)
        attend, skips = self.attend(x), LongSkips(self.depth)
        for block in self.transformer_blocks:
            (x,) = skips.join(block, x)
            x = self.run(block, x, mask, rope, attend)
            skips.keep(block, x)
        return self.proj_out(self.norm_out(x[:, :num])), None

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions = Conditions()) -> Any:
        return self.conv_out(super().forward(x_t, t, conditions))
