"""DiT (Peebles & Xie 2212.09748): a transformer on latent patches, conditioned by adaLN-Zero.

Text enters twice: its tokens by cross-attention in every block (PixArt-alpha 2310.00426), its pooled
vector beside t in the modulation. `modulation: shared` is PixArt's adaLN-single: one projection for
all blocks and a table per block.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.conditions import Conditions, given
from models.layers import (
    Attention,
    AttentionFunction,
    FeedForward,
    Mask,
    MLPEmbedder,
    Modulation,
    PatchTransformer,
    Rope,
    Tokens,
    Vector,
    initialise,
    modulate,
    positions_2d,
)
from models.networks import DiTConfig


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the text if there is any, MLP; the first and the last are modulated."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, _, heads = config.shape()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn1 = Attention(dim, heads, qk_norm=config.qk_norm)
        self.attn2 = Attention(dim, heads, dim, config.qk_norm) if config.text_dim else None
        self.ff = FeedForward(dim, int(dim * config.mlp_ratio))
        self.norm1 = Modulation(dim, 6) if config.modulation == "block" else None
        if config.modulation == "shared":
            self.scale_shift_table = nn.Parameter(torch.empty(6, dim))
            nn.init.normal_(self.scale_shift_table, std=dim**-0.5)

    def forward(
        self,
        x: Tokens,
        c: Vector | Float[Tensor, "B 6 D"],
        text: Float[Tensor, "B L D"] | None,
        mask: Mask,
        rope: Rope,
        attend: AttentionFunction,
    ) -> Tokens:
        table = c + self.scale_shift_table if self.norm1 is None else self.norm1(c)  # (B, 6, D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.unsqueeze(2).unbind(1)
        h = self.attn1(modulate(self.norm(x), shift_a, scale_a), attend, rope=rope)
        x = torch.addcmul(x, gate_a, h)
        if self.attn2 is not None and text is not None:
            x = x + self.attn2(x, attend, text, mask)
        return torch.addcmul(x, gate_m, self.ff(modulate(self.norm(x), shift_m, scale_m)))


class DiT(PatchTransformer):
    """Text- or class-conditioned DiT on latents of any size that the patch divides.

    Modulation, the output of cross-attention and the last layer start at zero, as training from scratch
    needs, so an untrained network returns exactly zero.
    """

    def __init__(self, config: DiTConfig):
        super().__init__(config, config.timestep_shift)
        dim, self.config = self.dim, config
        self.caption_projection = self.adaln_single = self.modulation_out = None
        if config.text_dim:
            self.caption_projection = MLPEmbedder(config.text_dim, dim, nn.GELU(approximate="tanh"))
        blocks = [DiTBlock(config) for _ in range(self.depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        if config.modulation == "shared":
            self.adaln_single = Modulation(dim, 6)
            self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
            nn.init.normal_(self.scale_shift_table, std=dim**-0.5)
        else:
            self.modulation_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, self.patch_dim)
        initialise(self, [self.proj_out, *(b.attn2.to_out for b in blocks if b.attn2)])

    def positions(self, height: int, width: int, device: torch.device) -> Float[Tensor, "N D"]:
        return positions_2d(height, width, self.dim, device, self.config.position_extent)

    def transform(
        self, x: Tokens, rope: Rope, vectors: list[Vector], conditions: Conditions
    ) -> tuple[Float[Tensor, "B M P"], Float[Tensor, "B M V"] | None]:
        c: Any = sum(vectors)
        text = mask = None
        if self.caption_projection is not None:
            text = self.caption_projection(given("text_emb", conditions.text_emb))  # (B, L, D)
            if conditions.text_mask is not None:
                mask = conditions.text_mask[:, None, None, :]
        of_blocks = c if self.adaln_single is None else self.adaln_single(c)
        attend = self.attend(x)

        def step(block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
            return self.run(block, x, of_blocks, text, mask, rope, attend)

        x, projection = self.through(x, rope, conditions.token_scores, step)
        if self.modulation_out is not None:
            table = self.modulation_out(c)  # (B, 2, D)
        else:
            table = c[:, None] + self.scale_shift_table
        shift, scale = table.unsqueeze(2).unbind(1)
        return self.proj_out(modulate(self.norm_out(x), shift, scale)), projection
