"""DiT (Peebles & Xie 2212.09748): a transformer on latent patches, conditioned by adaLN-Zero.

Text enters twice: its tokens by cross-attention in every block (PixArt-alpha 2310.00426), its pooled
vector beside t in the modulation. `modulation: shared` is PixArt's adaLN-single: one projection for
all blocks and a table per block; with `none` the norms have weights of their own, and nothing is told of t.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.conditions import Conditions
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
    gated,
    initialise,
    input_norm,
    modulate,
    rms_norm,
)
from models.networks import DiTConfig


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the text if there is any, MLP; the first and the last are modulated."""

    def __init__(self, config: DiTConfig, skip: bool):
        super().__init__()
        (dim, *_), sandwich = config.shape(), config.sandwich_norm
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm, self.norm_ff = input_norm(config), input_norm(config)
        self.after_attention, self.after_ff = (rms_norm(dim, sandwich) for _ in range(2))
        self.attn1 = Attention(config)
        self.attn2 = Attention(config) if config.text_dim else None
        self.ff = FeedForward(config)
        self.norm1 = Modulation(dim, 6) if config.modulation == "block" else None
        self.scale_shift_table = None
        if config.modulation == "shared":
            self.scale_shift_table = nn.Parameter(torch.empty(6, dim))
            nn.init.normal_(self.scale_shift_table, std=dim**-0.5)

    def forward(
        self,
        x: Float[Tensor, "B N _"],
        rope: Rope,
        attend: AttentionFunction,
        c: Vector | Float[Tensor, "B 6 D"] | None,
        text: Float[Tensor, "B L D"] | None,
        mask: Mask,
    ) -> tuple[Tokens]:
        if self.skip_linear is not None:
            x = self.skip_linear(x)
        shift_a = scale_a = gate_a = shift_m = scale_m = gate_m = None
        if c is not None:
            own: Any = self.scale_shift_table
            table = self.norm1(c) if self.norm1 is not None else c + own  # (B, 6, D)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.unsqueeze(2).unbind(1)
        h = self.attn1(modulate(self.norm(x), shift_a, scale_a), attend, rope=rope)
        x = gated(x, gate_a, self.after_attention(h))
        if self.attn2 is not None and text is not None:
            x = x + self.attn2(x, attend, text, mask)
        h = self.ff(modulate(self.norm_ff(x), shift_m, scale_m))
        return (gated(x, gate_m, self.after_ff(h)),)


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
        half = self.depth // 2
        blocks = [DiTBlock(config, config.long_skips and i > half) for i in range(self.depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out, self.scale_shift_table = input_norm(config), None
        if config.modulation == "shared":
            self.adaln_single = Modulation(dim, 6)
            self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
            nn.init.normal_(self.scale_shift_table, std=dim**-0.5)
        elif config.modulation == "block":
            self.modulation_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, self.patch_dim)
        initialise(self, [self.proj_out, *(b.attn2.to_out for b in blocks if b.attn2)])

    def transform(
        self, x: Tokens, num: int, rope: Rope, vectors: list[Vector], conditions: Conditions
    ) -> tuple[Float[Tensor, "B M P"], Float[Tensor, "B M V"] | None]:
        c: Any = sum(vectors) if vectors else None
        shift = scale = None
        of_blocks = c if self.adaln_single is None else self.adaln_single(c)
        told = (of_blocks, *self.read(self.caption_projection, conditions, x))
        x, projection = self.through((x,), num, rope, conditions.token_scores, told)
        if self.modulation_out is not None:
            shift, scale = self.modulation_out(c).unsqueeze(2).unbind(1)
        elif self.scale_shift_table is not None:
            shift, scale = (c[:, None] + self.scale_shift_table).unsqueeze(2).unbind(1)
        return self.proj_out(modulate(self.norm_out(x), shift, scale)), projection
