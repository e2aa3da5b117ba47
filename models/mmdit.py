"""MMDiT (SD3, Esser 2403.03206): text and patches in two streams that meet in every attention.

`qk_norm` and `dual_attention_layers` are SD3.5's. Unlike theirs, padded text can be masked. The text stream ends
in the last block, where text gives keys and values only. i1 (2606.11289) is `modulation: none` with `sandwich_norm`,
`swiglu`, `qk_norm`, `long_skips`, `text_rope` and a `text_adapter` of 2; its adapter sees padding too, ours does not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.conditions import Conditions
from models.config import InputError
from models.layers import (
    Attention,
    AttentionFunction,
    FeedForward,
    Latents,
    Mask,
    Modulation,
    PatchTransformer,
    Rope,
    Tokens,
    Vector,
    gated,
    initialise,
    input_norm,
    modulate,
    positions_2d,
    rms_norm,
    rope_2d,
    rotate,
)
from models.networks import MMDiTConfig


class JointAttention(Attention):
    """Attention of patches and text to both, text with projections of its own."""

    def __init__(self, config: MMDiTConfig, last: bool):
        super().__init__(config)
        dim, _, heads = config.shape()
        self.add_k_proj, self.add_v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_added_k = rms_norm(dim // heads, config.qk_norm)
        self.add_q_proj = None if last else nn.Linear(dim, dim)
        self.norm_added_q = rms_norm(dim // heads, config.qk_norm and not last)
        self.to_add_out = None if last else nn.Linear(dim, dim)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tokens,
        text: Float[Tensor, "B L D"],
        attend: AttentionFunction,
        mask: Mask,
        rope: Rope,
    ) -> tuple[Tokens, Float[Tensor, "B L D"] | None]:
        num = x.shape[1]
        q = self.norm_q(self.split(self.to_q(x)))
        if self.add_q_proj is not None:
            q = torch.cat([q, self.norm_added_q(self.split(self.add_q_proj(text)))], dim=1)
        k = self.norm_k(self.split(self.to_k(x)))
        k = torch.cat([k, self.norm_added_k(self.split(self.add_k_proj(text)))], dim=1)
        q, k = rotate(q, rope), rotate(k, rope)
        v = torch.cat([self.split(self.to_v(x)), self.split(self.add_v_proj(text))], dim=1)
        if mask is not None:
            mask = F.pad(mask, (num, 0), value=True)  # (B, 1, 1, N + L)
        out = attend(q, k, v, mask).flatten(2)
        text_out = None if self.to_add_out is None else self.to_add_out(out[:, num:])
        return self.to_out[0](out[:, :num]), text_out


def joint_rope(rope: Tensor, sizes: tuple[int, int, int], mask: Mask) -> Tensor:
    """RoPE's table of patches, registers and text from that of the patches' rows and columns (i1 2606.11289).

    `sizes` are a head's width, the number of patches and registers, and the text's length. Token n of the text is at
    place n, a patch at the text's length, and registers are not turned: (R, T, d / 2, 2).
    """
    (width, tokens, length), patches, turned = sizes, *rope.shape[1:3]
    half = width // 2 - turned
    ends = rope.new_tensor([length]) if mask is None else mask.flatten(1).sum(1).to(rope.dtype)
    steps = torch.arange(length, device=rope.device, dtype=rope.dtype).expand(len(ends), -1)
    places = torch.cat([ends[:, None].expand(-1, patches), steps.new_zeros(len(ends), tokens - patches), steps], dim=1)  # fmt: skip
    angles = places[..., None] * 1e4 ** -(torch.arange(half, device=rope.device) / half)
    still = rope.new_tensor([1.0, 0.0]).expand(1, tokens - patches + length, turned, 2)
    axes = torch.cat([rope, still], dim=1).expand(len(ends), -1, -1, -1)
    return torch.cat([torch.stack([angles.cos(), angles.sin()], dim=-1), axes], dim=2)


class MMDiTBlock(nn.Module):
    """Joint attention, for some blocks a second one among the patches, and an MLP for each stream, which share the norms."""

    def __init__(self, config: MMDiTConfig, number: int):
        super().__init__()
        (dim, depth, _), sandwich = config.shape(), config.sandwich_norm
        dual, last = number < config.dual_attention_layers, number == depth - 1
        self.skip_linear = self.norm1 = self.norm1_context = None
        if config.long_skips and number > depth // 2:
            self.skip_linear = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(2))
        self.norm, self.norm_ff = input_norm(config), input_norm(config)
        self.after_attention, self.after_ff = (rms_norm(dim, sandwich) for _ in range(2))
        if config.modulation != "none":
            self.norm1 = Modulation(dim, 9 if dual else 6)
            self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(config, last)
        self.attn2 = Attention(config) if dual else None
        self.ff = FeedForward(config)
        self.ff_context = None if last else FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "B N _"],
        text: Float[Tensor, "B L _"],
        rope: Rope,
        attend: AttentionFunction,
        c: Vector | None,
        mask: Mask,
    ) -> tuple[Tokens, Float[Tensor, "B L D"]]:
        if self.skip_linear is not None:
            x, text = self.skip_linear[0](x), self.skip_linear[1](text)
        own: Any = [None] * 9
        table: Any = [None] * 6
        if self.norm1 is not None and self.norm1_context is not None:
            own = self.norm1(c).unsqueeze(2).unbind(1)
            table = self.norm1_context(c).unsqueeze(2).unbind(1)
        shift, scale, gate, shift_m, scale_m, gate_m, *dual = own
        # SD3's order: scale first where there are two.
        shift_t, scale_t = table[:2] if self.ff_context is not None else table[1::-1]
        normed, normed_text = self.norm(x), modulate(self.norm(text), shift_t, scale_t)
        out, text_out = self.attn(modulate(normed, shift, scale), normed_text, attend, mask, rope)
        x = gated(x, gate, self.after_attention(out))
        if self.attn2 is not None:
            shift, scale, gate = dual
            out = self.attn2(modulate(normed, shift, scale), attend, rope=rope)
            x = gated(x, gate, self.after_attention(out))
        out = self.ff(modulate(self.norm_ff(x), shift_m, scale_m))
        x = gated(x, gate_m, self.after_ff(out))
        if self.ff_context is not None:
            _, _, gate, shift_m, scale_m, gate_m = table
            text = gated(text, gate, self.after_attention(text_out))
            out = self.ff_context(modulate(self.norm_ff(text), shift_m, scale_m))
            text = gated(text, gate_m, self.after_ff(out))
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
            MMDiTBlock(config, number) for number in range(self.depth)
        )
        self.norm = input_norm(config)
        self.norm_out = Modulation(dim, 2) if config.modulation != "none" else None
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
        grid = self.config.position_grid
        if self.position_table is None or max(height, width) > grid:
            return positions_2d(height, width, self.dim, device, self.config.position_extent, grid)
        top, left = (grid - height) // 2, (grid - width) // 2
        table = self.position_table.view(grid, grid, -1)
        return table[top : top + height, left : left + width].flatten(0, 1)

    def embed(self, x_t: Latents) -> tuple[Tokens, Rope]:
        x, rope = super().embed(x_t)
        if self.config.text_rope:
            height, width = (side // self.config.patch_size for side in x_t.shape[-2:])
            scale = self.config.position_extent / self.config.position_grid
            rope = rope_2d(height, width, self.dim // self.num_heads // 2, x.device, scale)
        return x, rope

    def transform(
        self, x: Tokens, num: int, rope: Rope, vectors: list[Vector], conditions: Conditions
    ) -> tuple[Float[Tensor, "B M P"], Float[Tensor, "B M V"] | None]:
        c = sum(vectors) if vectors else None
        text, mask = self.read(self.context_embedder, conditions, x)
        assert text is not None
        if self.config.text_rope and rope is not None:
            rope = joint_rope(rope, (self.dim // self.num_heads, x.shape[1], text.shape[1]), mask)
        x, projection = self.through((x, text), num, rope, conditions.token_scores, (c, mask))
        scale = shift = None
        if self.norm_out is not None:
            scale, shift = self.norm_out(c).unsqueeze(2).unbind(1)
        return self.proj_out(modulate(self.norm(x), shift, scale)), projection
