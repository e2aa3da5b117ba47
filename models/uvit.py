"""U-ViT (Bao 2209.12152): all conditions are tokens, and long skips join shallow blocks to deep ones.

Positions are fixed sine-cosines (theirs: learned for one size), so that any latent shape goes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.conditions import Conditions, check_shapes, given
from models.layers import (
    Attention,
    AttentionFunction,
    ConditionEmbedder,
    FeedForward,
    PatchTransformer,
    initialise,
    unpatchify,
)
from models.networks import UViTConfig


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP; of the second half, a linear merges the long skip first."""

    def __init__(self, config: UViTConfig, skip: bool):
        super().__init__()
        dim, _, heads = config.shape()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qk_norm=config.qk_norm, qkv_bias=False)
        self.ff = FeedForward(dim, int(dim * config.mlp_ratio))

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        skip: Float[Tensor, "B N D"] | None,
        mask: Bool[Tensor, "B 1 1 N"] | None,
        rope: Float[Tensor, "R M e 2"] | None,
        attend: AttentionFunction,
    ) -> Float[Tensor, "B N D"]:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x), attend, mask=mask, rope=rope)
        return x + self.ff(self.norm2(x))


class UViT(PatchTransformer):
    """Text- or class-conditioned; its last convolution starts at zero, so untrained it returns zero."""

    def __init__(self, config: UViTConfig):
        super().__init__(config)
        dim, self.config = self.dim, config
        self.time_text_embed = ConditionEmbedder(config, dim)
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

    def forward(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: Float[Tensor, " B"],
        conditions: Conditions = Conditions(),
    ) -> Float[Tensor, "B C h w"]:
        """Prediction for latents x_t at time t (0 data, 1 noise), in the network's dtype."""
        check_shapes(x_t, t, *conditions)
        height, width = x_t.shape[-2:]
        x, rope = self.embed(x_t)
        tokens = [x, *(v[:, None] for v in self.time_text_embed(t, conditions))]
        x, mask = torch.cat(tokens, dim=1), None
        if self.context_embedder is not None:
            text = self.context_embedder(given("text_emb", conditions.text_emb).to(x.dtype))
            if conditions.text_mask is not None:
                mask = F.pad(conditions.text_mask, (x.shape[1], 0), value=True)[:, None, None]
            x = torch.cat([x, text], dim=1)  # (B, patches, registers, conditions, text; D)
        attend = self.attend(x)
        skips: list[Tensor] = []
        for i, block in enumerate(self.transformer_blocks):
            skip = skips.pop() if i > self.depth // 2 else None
            x = self.run(block, x, skip, mask, rope, attend)
            if i < self.depth // 2:
                skips.append(x)
        p = self.config.patch_size
        x = self.proj_out(self.norm_out(x[:, : height * width // p**2]))  # (B, N, p*p*C)
        return self.conv_out(unpatchify(x, p, height, width))
