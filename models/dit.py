"""DiT (Peebles & Xie 2212.09748): a transformer on latent patches, conditioned by adaLN-Zero.

Text enters twice: its tokens by cross-attention in every block (PixArt-alpha 2310.00426), its pooled
vector beside t in the modulation. `modulation: shared` is PixArt's adaLN-single: one projection for
all blocks and a table a block.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import Config, InputError
from models.layers import (
    Attention,
    FeedForward,
    MLPEmbedder,
    TimestepEmbedder,
    modulate,
    patchify,
    positions_2d,
    sinusoid,
    unpatchify,
)

# hidden_size, depth, num_heads; S to XL are the paper's table 1.
SIZES = {
    "debug": (64, 2, 2),
    "tiny": (256, 6, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class DiTConfig(Config):
    """A size by name, any part of it overridden; sizes that the data fixes default to the dataset's."""

    kind: Literal["dit"] = "dit"
    size: Literal["debug", "tiny", "S", "B", "L", "XL"] = "B"
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int = 2
    mlp_ratio: float = 4.0
    modulation: Literal["block", "shared"] = "block"
    qk_norm: bool = False
    size_conditioning: bool = False  # original size and crop, as SDXL (2307.01952, 2.2)
    attention: Literal["sdpa", "xformers"] = "sdpa"
    gradient_checkpointing: bool = False
    # The dataset's, where left out.
    latent_channels: int | None = None
    text_dim: int | None = None  # 0: no cross-attention
    pooled_dim: int | None = None  # 0: none
    num_classes: int = 0  # one more is added, for no class

    def shape(self) -> tuple[int, int, int]:
        """hidden_size, depth, num_heads, checked."""
        hidden, depth, heads = SIZES[self.size]
        hidden, depth = self.hidden_size or hidden, self.depth or depth
        heads = self.num_heads or heads
        if hidden % (4 * heads):
            raise InputError(
                f"model.hidden_size: got {hidden}, expected a multiple of {4 * heads} (4 x num_heads)"
            )
        return hidden, depth, heads


class Modulation(nn.Module):
    """adaLN-Zero's SiLU and linear, zero at the start, so that every block begins as the identity."""

    def __init__(self, dim: int, num: int):
        super().__init__()
        self.num = num
        self.linear = nn.Linear(dim, num * dim)

    def forward(self, c: Float[Tensor, "B D"]) -> Float[Tensor, "B num D"]:
        return self.linear(nn.functional.silu(c)).unflatten(-1, (self.num, -1))


class DiTBlock(nn.Module):
    """Self-attention, cross-attention on the text if there is one, MLP; the first and last modulated."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, _, heads = config.shape()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn1 = Attention(dim, heads, qk_norm=config.qk_norm, backend=config.attention)
        self.attn2 = None
        if config.text_dim:
            self.attn2 = Attention(dim, heads, dim, config.qk_norm, config.attention)
        self.ff = FeedForward(dim, int(dim * config.mlp_ratio))
        self.norm1 = Modulation(dim, 6) if config.modulation == "block" else None
        if config.modulation == "shared":
            self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        c: Float[Tensor, "B D"],
        shared: Float[Tensor, "B 6 D"] | None,
        text: Float[Tensor, "B L D"] | None,
        mask: Bool[Tensor, "B 1 1 L"] | None,
    ) -> Float[Tensor, "B N D"]:
        if self.norm1 is not None:
            table = self.norm1(c)  # (B, 6, D)
        else:
            assert shared is not None
            table = shared + self.scale_shift_table
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.unsqueeze(2).unbind(1)
        x = x + gate_a * self.attn1(modulate(self.norm(x), shift_a, scale_a))
        if self.attn2 is not None and text is not None:
            x = x + self.attn2(x, text, mask)
        return x + gate_m * self.ff(modulate(self.norm(x), shift_m, scale_m))


class DiT(nn.Module):
    """Text- or class-conditioned DiT on latents of any size that the patch divides.

    Training from scratch needs the zero initialisation done here: modulation, cross-attention's
    and the network's last layer start at zero, so an untrained network returns exactly zero.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim, depth, _ = config.shape()
        if not config.latent_channels:
            raise InputError("model.latent_channels: missing; it is the dataset's, or the codec's")
        patch_dim = config.patch_size**2 * config.latent_channels
        self.proj_in = nn.Linear(patch_dim, dim)
        self.timestep_embedder = TimestepEmbedder(dim)
        self.caption_projection = self.pooled_embedder = None
        self.class_embedder = self.size_embedder = self.adaln_single = None
        if config.text_dim:
            self.caption_projection = MLPEmbedder(config.text_dim, dim, nn.GELU(approximate="tanh"))
        if config.pooled_dim:
            self.pooled_embedder = MLPEmbedder(config.pooled_dim, dim, nn.SiLU())
        if config.num_classes:
            self.class_embedder = nn.Embedding(config.num_classes + 1, dim)
        if config.size_conditioning:
            self.size_embedder = MLPEmbedder(4 * 256, dim, nn.SiLU())
        if config.modulation == "shared":
            self.adaln_single = Modulation(dim, 6)
        self.transformer_blocks = nn.ModuleList(DiTBlock(config) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_dim)
        self.initialise()

    def initialise(self) -> None:
        """DiT's initialisation: Xavier for linears, 0.02 for embeddings, zero where the text says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embedders = (self.timestep_embedder, self.pooled_embedder, self.size_embedder)
        for embedder in filter(None, embedders):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.weight, std=0.02)
        zeros: list[nn.Linear] = [self.modulation_out.linear, self.proj_out]
        for block in self.modules():
            if isinstance(block, DiTBlock):
                zeros += [block.norm1.linear] if block.norm1 else []
                zeros += [block.attn2.to_out[0]] if block.attn2 else []  # pyright: ignore[reportAssignmentType, reportOperatorIssue]
        if self.adaln_single is not None:
            zeros.append(self.adaln_single.linear)
        for linear in zeros:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def condition(
        self,
        t: Float[Tensor, " B"],
        pooled: Float[Tensor, "B P"] | None,
        micro: Float[Tensor, "B 4"] | None,
        label: Int[Tensor, " B"] | None,
    ) -> Float[Tensor, "B D"]:
        """The modulation vector: t, and what else the config has, summed."""
        c = self.timestep_embedder(t)
        given = {"pooled": pooled, "micro": micro, "label": label}
        used = {
            "pooled": self.pooled_embedder,
            "micro": self.size_embedder,
            "label": self.class_embedder,
        }
        for name, module in used.items():
            if module is None:
                continue
            value = given[name]
            if value is None:
                raise ValueError(f"{name}: got None; this model was built to be conditioned on it")
            if name == "micro":
                value = sinusoid(value, 256).flatten(1)
            c = c + module(value)
        return c

    def forward(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: Float[Tensor, " B"],
        text_emb: Float[Tensor, "B L E"] | None = None,
        text_mask: Bool[Tensor, "B L"] | None = None,
        pooled: Float[Tensor, "B P"] | None = None,
        micro: Float[Tensor, "B 4"] | None = None,
        label: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """Prediction for latents x_t at time t (0 data, 1 noise), in the network's dtype."""
        height, width = x_t.shape[-2:]
        p, dtype = self.config.patch_size, self.proj_in.weight.dtype
        x = self.proj_in(patchify(x_t, p).to(dtype))  # (B, N, D)
        x = x + positions_2d(height // p, width // p, x.shape[-1], x.device).to(dtype)
        c = self.condition(t, pooled, micro, label)
        text = mask = None
        if self.caption_projection is not None:
            if text_emb is None:
                raise ValueError(
                    "text_emb: got None; this model was built to be conditioned on text"
                )
            text = self.caption_projection(text_emb)  # (B, L, D)
            mask = None if text_mask is None else text_mask[:, None, None, :]
        shared = None if self.adaln_single is None else self.adaln_single(c)
        for block in self.transformer_blocks:
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, shared, text, mask, use_reentrant=False)
            else:
                x = block(x, c, shared, text, mask)
        shift, scale = self.modulation_out(c).unsqueeze(2).unbind(1)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))  # (B, N, p*p*C)
        return unpatchify(x, p, height, width)
