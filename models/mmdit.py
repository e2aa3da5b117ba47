"""MMDiT (SD3, Esser 2403.03206): text and patches in two streams that meet in every attention.

`qk_norm` and `dual_attention_layers` are SD3.5's. Unlike theirs, padded text can be masked. The text stream ends
in the last block, where text gives keys and values only.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.conditions import Conditions, given
from models.config import InputError
from models.layers import (
    Attention,
    AttentionFunction,
    FeedForward,
    Modulation,
    PatchTransformer,
    Rope,
    Tokens,
    Vector,
    initialise,
    modulate,
    positions_2d,
    qk_normalisation,
    rotate,
)
from models.networks import MMDiTConfig


class JointAttention(Attention):
    """Attention of patches and text to both, text with projections of its own."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, last: bool):
        super().__init__(dim, num_heads, qk_norm=qk_norm)
        self.add_k_proj, self.add_v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_added_k = qk_normalisation(dim // num_heads, qk_norm)
        self.add_q_proj = None if last else nn.Linear(dim, dim)
        self.norm_added_q = nn.Identity() if last else qk_normalisation(dim // num_heads, qk_norm)
        self.to_add_out = None if last else nn.Linear(dim, dim)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tokens,
        text: Float[Tensor, "B L D"],
        attend: AttentionFunction,
        mask: Bool[Tensor, "B L"] | None,
        rope: Rope,
    ) -> tuple[Tokens, Float[Tensor, "B L D"] | None]:
        num = x.shape[1]
        q = rotate(self.norm_q(self.split(self.to_q(x))), rope)
        if self.add_q_proj is not None:
            q = torch.cat([q, self.norm_added_q(self.split(self.add_q_proj(text)))], dim=1)
        k = rotate(self.norm_k(self.split(self.to_k(x))), rope)
        k = torch.cat([k, self.norm_added_k(self.split(self.add_k_proj(text)))], dim=1)
        v = torch.cat([self.split(self.to_v(x)), self.split(self.add_v_proj(text))], dim=1)
        if mask is not None:
            mask = F.pad(mask, (num, 0), value=True)[:, None, None]  # (B, 1, 1, N + L)
        out = attend(q, k, v, mask).flatten(2)
        text_out = None if self.to_add_out is None else self.to_add_out(out[:, num:])
        return self.to_out[0](out[:, :num]), text_out


class MMDiTBlock(nn.Module):
    """Joint attention, with `dual` a second attention among the patches, and an MLP for each stream."""

    def __init__(self, config: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        dim, _, heads = config.shape()
        hidden = int(dim * config.mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, heads, config.qk_norm, last)
        self.attn2 = Attention(dim, heads, qk_norm=config.qk_norm) if dual else None
        self.ff = FeedForward(dim, hidden)
        self.ff_context = None if last else FeedForward(dim, hidden)

    def forward(
        self,
        x: Tokens,
        text: Float[Tensor, "B L D"],
        c: Vector,
        mask: Bool[Tensor, "B L"] | None,
        rope: Rope,
        attend: AttentionFunction,
    ) -> tuple[Tokens, Float[Tensor, "B L D"]]:
        shift, scale, gate, shift_m, scale_m, gate_m, *dual = self.norm1(c).unsqueeze(2).unbind(1)
        table = self.norm1_context(c).unsqueeze(2).unbind(1)
        # SD3's order: scale first where there are two.
        shift_t, scale_t = table[:2] if self.ff_context is not None else table[::-1]
        normed, normed_text = self.norm(x), modulate(self.norm(text), shift_t, scale_t)
        out, text_out = self.attn(modulate(normed, shift, scale), normed_text, attend, mask, rope)
        x = torch.addcmul(x, gate, out)
        if self.attn2 is not None:
            shift, scale, gate = dual
            out = self.attn2(modulate(normed, shift, scale), attend, rope=rope)
            x = torch.addcmul(x, gate, out)
        x = torch.addcmul(x, gate_m, self.ff(modulate(self.norm(x), shift_m, scale_m)))
        if self.ff_context is not None:
            _, _, gate, shift_m, scale_m, gate_m = table
            text = torch.addcmul(text, gate, text_out)
            out = self.ff_context(modulate(self.norm(text), shift_m, scale_m))
            text = torch.addcmul(text, gate_m, out)
        return x, text


class MMDiT(PatchTransformer):
    """Text-conditioned; untrained it returns exactly zero. Raises InputError without text."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        dim, self.config = self.dim, config
        if not config.text_dim:
            raise InputError(
                "model.text_dim: got none, but mmdit needs text tokens. Remedy: kind dit"
            )
        self.context_embedder = nn.Linear(config.text_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            MMDiTBlock(config, i < config.dual_attention_layers, i == self.depth - 1)
            for i in range(self.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, self.patch_dim)
        self.position_table = None
        if config.learned_positions:
            grid = config.position_grid
            table = self.positions(grid, grid, torch.device("cpu"))
            self.position_table = nn.Parameter(torch.empty(table.shape))
            with torch.no_grad():
                self.position_table.copy_(table)
        initialise(self, [self.proj_out])

    def positions(self, height: int, width: int, device: torch.device) -> Float[Tensor, "N D"]:
        grid, extent = self.config.position_grid, self.config.position_extent
        if self.position_table is None or max(height, width) > grid:
            return positions_2d(height, width, self.dim, device, extent, grid)
        top, left = (grid - height) // 2, (grid - width) // 2
        table = self.position_table.view(grid, grid, -1)
        return table[top : top + height, left : left + width].flatten(0, 1)

    def transform(
        self, x: Tokens, rope: Rope, vectors: list[Vector], conditions: Conditions
    ) -> tuple[Float[Tensor, "B M P"], Float[Tensor, "B M V"] | None]:
        c = sum(vectors)
        text = self.context_embedder(given("text_emb", conditions.text_emb).to(x.dtype))
        attend = self.attend(x)

        def step(block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
            nonlocal text
            x, text = self.run(block, x, text, c, conditions.text_mask, rope, attend)
            return x

        x, projection = self.through(x, rope, conditions.token_scores, step)
        scale, shift = self.norm_out(c).unsqueeze(2).unbind(1)
        return self.proj_out(modulate(self.norm(x), shift, scale)), projection
