"""Pieces that the networks share: patches, positions, conditioning, attention, MLP, modulation.

Parameter names follow diffusers' where the maths is the same, so that weights carry over.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.conditions import Conditions, check_inputs, given
from models.config import InputError
from models.networks import NetworkConfig, RoutedConfig, Span, TransformerConfig

PROJECTOR = "projector."
"""How the names of parameters begin that only training has."""

RECOMPILE_LIMIT = 64
"""Graphs of one class of blocks; 26 is the most that tests/test_compile.py has seen."""

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Latents = Float[Tensor, "B C h w"]
Tokens = Float[Tensor, "B N D"]
Vector = Float[Tensor, "B D"]
Mask = Bool[Tensor, "B 1 1 L"] | None
"""Text that attention may look at; None: all of it."""
Rope = Float[Tensor, "R T e 2"] | None
"""cos and sin by which the first T tokens are turned, the same (R = 1) or other ones (R = B) for each picture."""


def patchify(x: Float[Tensor, "B C h w"], patch_size: int) -> Float[Tensor, "B N P"]:
    """Row-major patches, each (patch row, patch column, channel), as DiT (Peebles & Xie 2212.09748).

    Raises ValueError where the patch does not divide the latent.
    """
    batch, channels, height, width = x.shape
    p = patch_size
    if height % p or width % p:
        raise ValueError(f"latent {height}x{width}: not divisible by patch_size {p}")
    x = x.view(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(
    tokens: Float[Tensor, "B N P"], patch_size: int, height: int, width: int
) -> Float[Tensor, "B C h w"]:
    """Inverse of `patchify` for a latent of `height` x `width`."""
    p = patch_size
    x = tokens.view(tokens.shape[0], height // p, width // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height, width)


def sinusoid(x: Float[Tensor, "*S"], dim: int, shift: int = 0) -> Float[Tensor, "*S D"]:
    """cos then sin at `dim`/2 geometric frequencies, fp32 whatever the network's dtype.

    In bf16 an argument of 1000 t would be off by up to 2 radians. The last frequency is 1e-4 with
    shift 1, one step before it with 0.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=x.device)
    angles = x.float()[..., None] * torch.exp(-math.log(1e4) / (half - shift) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # else a table first made while sampling could not be trained with
def positions_2d(
    height: int,
    width: int,
    dim: int,
    device: torch.device,
    extent: float | None = None,
    grid: int | None = None,
) -> Float[Tensor, "N D"]:
    """Fixed sine-cosine position of each patch of a height x width grid (MAE 2111.06377, DiT).

    The first half of the features encodes the column, the second the row; sin then cos in each. Positions
    count patches. With `extent` they run from 0 to it whatever the size (PixArt); with `grid` too, a square of
    `grid` patches runs from 0 to `extent`, and the positions are its middle (SD3).
    """
    quarter = dim // 4
    omega = 1.0 / 1e4 ** (torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def axis(size: int) -> Tensor:
        whole = grid or size
        if size > whole:
            raise ValueError(
                f"latent of {height}x{width} patches: expected at most {whole} per side"
            )
        steps = torch.arange(size, dtype=torch.float64, device=device) + (whole - size) // 2
        return steps * ((extent or whole) / whole)

    row, column = torch.meshgrid(axis(height), axis(width), indexing="ij")
    halves = []
    for positions in (column, row):
        angles = positions.reshape(-1, 1) * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # else a table first made while sampling could not be trained with
def rope_2d(
    height: int, width: int, head_dim: int, device: torch.device, scale: float = 1.0
) -> Float[Tensor, "1 N d 2"]:
    """cos and sin of each patch's rotations (RoFormer 2104.09864): half the pairs turn by row, half by column.

    Positions count patches, times `scale`.
    """
    quarter = head_dim // 4
    omega = scale * 1e4 ** -(torch.arange(quarter, device=device) / quarter)
    row, column = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    angles = torch.cat([axis.reshape(-1, 1) * omega for axis in (row, column)], dim=1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None]


def rotate(x: Float[Tensor, "B N H d"], rope: Rope) -> Float[Tensor, "B N H d"]:
    """Turn the pairs (i, i + d/2) of the first T tokens; the tokens after them have no position."""
    if rope is None:
        return x
    cos, sin = rope[:, : x.shape[1], None].unbind(-1)  # (R, T, 1, d/2)
    head, rest = x[:, : cos.shape[1]], x[:, cos.shape[1] :]
    first, second = head.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=1)


class MLPEmbedder(nn.Module):
    """Two linear layers with an activation between, for t, pooled text or caption tokens."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.act = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x.to(self.linear_1.weight.dtype))))


class TimestepEmbedder(MLPEmbedder):
    """t in [0, 1] -> vector: sinusoid of 1000 t in fp32, then an MLP."""

    def __init__(self, dim: int, shift: int = 0):
        super().__init__(256, dim, nn.SiLU())
        self.shift = shift

    def forward(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        return super().forward(sinusoid(1000.0 * x, 256, self.shift))


class ConditionEmbedder(nn.Module):
    """Embeds t and whichever of these the config has: pooled text, original size and crop, class."""

    def __init__(self, config: NetworkConfig, dim: int, shift: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(dim, shift)
        self.text_embedder = self.size_embedder = self.class_embedder = None
        if config.pooled_dim:
            self.text_embedder = MLPEmbedder(config.pooled_dim, dim, nn.SiLU())
        if config.size_conditioning:
            self.size_embedder = MLPEmbedder(4 * 256, dim, nn.SiLU())
        if config.num_classes:
            self.class_embedder = nn.Embedding(config.num_classes + 1, dim)

    def forward(self, t: Float[Tensor, " B"], conditions: Conditions) -> list[Vector]:
        vectors = [self.timestep_embedder(t)]
        if self.text_embedder is not None:
            vectors.append(self.text_embedder(given("pooled", conditions.pooled)))
        if self.size_embedder is not None:
            micro = sinusoid(given("micro", conditions.micro), 256)  # (B, 4, 256)
            vectors.append(self.size_embedder(micro.flatten(1)))
        if self.class_embedder is not None:
            vectors.append(self.class_embedder(given("label", conditions.label)))
        return vectors


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's scaled dot-product attention of q, k, v (B, L, heads, d) under a bool mask (B, 1, 1, L_k)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """xformers' memory-efficient attention; same arguments as `sdpa`."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    bias = None
    if mask is not None:
        # Its kernels want the rows of the bias aligned to 8, so it is allocated wider, then cut: one
        # row for each picture, which stands for all its heads and queries.
        (batch, length, heads, _), keys = q.shape, k.shape[1]
        wide = q.new_zeros(batch, 1, 1, -(-keys // 8) * 8)
        row = wide[..., :keys].masked_fill_(~mask, float("-inf"))
        bias = row.expand(batch, heads, length, keys)
    return memory_efficient_attention(q, k, v, attn_bias=bias)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """flash-attn (2307.08691); masked keys are packed away, since its kernels take no mask."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    if mask is None:
        return flash_attn_func(q, k, v)
    batch, length = q.shape[:2]
    keep = mask.expand(batch, 1, 1, -1).flatten()
    ends_k = F.pad(keep.view(batch, -1).sum(1).cumsum(0), (1, 0)).int()
    ends_q = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
    # The CPU is not to wait for the GPU: the longest key is bounded, not looked up, and packed keys
    # have room for all. Masked ones go to a row more, which is cut off with its gradient.
    places = torch.where(keep, keep.cumsum(0) - 1, len(keep))
    k, v = (
        x.new_zeros(len(keep) + 1, *x.shape[2:]).index_copy(0, places, x.flatten(0, 1))[:-1]
        for x in (k, v)
    )
    sizes = (length, len(keep) // batch)
    out = flash_attn_varlen_func(q.flatten(0, 1), k, v, ends_q, ends_k, *sizes)
    return out.unflatten(0, (batch, length))


ATTENTION: dict[str, AttentionFunction] = {"sdpa": sdpa, "xformers": xformers, "flash": flash}


@lru_cache
def attention_backend(name: str, device_type: str, dtype: torch.dtype) -> AttentionFunction:
    """The backend of that name if a tiny call of it runs on this device, else SDPA with one warning."""
    if name == "sdpa":
        return ATTENTION[name]
    q = torch.randn(1, 8, 1, 64, device=device_type, dtype=dtype)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool, device=device_type)
    try:
        ATTENTION[name](q, q, q, mask)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"attention backend {name}: {reason}; using sdpa", stacklevel=2)
        return sdpa
    return ATTENTION[name]


class Attention(nn.Module):
    """Multi-head attention, to itself or to a context; QK-norm is an RMSNorm per head (2302.05442)."""

    def __init__(self, config: TransformerConfig, qkv_bias: bool = True):
        super().__init__()
        dim, _, self.num_heads = config.shape()
        head = dim // self.num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = (rms_norm(head, config.qk_norm) for _ in range(2))

    def split(self, x: Tokens) -> Float[Tensor, "B N H d"]:
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(
        self,
        x: Tokens,
        attend: AttentionFunction,
        context: Float[Tensor, "B L D"] | None = None,
        mask: Mask = None,
        rope: Rope = None,
    ) -> Tokens:
        source = x if context is None else context
        q = rotate(self.norm_q(self.split(self.to_q(x))), rope)
        k = rotate(self.norm_k(self.split(self.to_k(source))), rope)
        out = attend(q, k, self.split(self.to_v(source)), mask)
        return self.to_out[0](out.flatten(2))


def rms_norm(dim: int, used: bool = True) -> nn.Module:
    return nn.RMSNorm(dim, eps=1e-6) if used else nn.Identity()


class Projection(nn.Module):
    """Linear then tanh GELU; as SwiGLU, to twice the width, whose first half the SiLU of the second gates (2002.05202).

    A module of its own for the sake of diffusers' parameter names.
    """

    def __init__(self, dim: int, hidden_dim: int, swiglu: bool):
        super().__init__()
        self.proj, self.swiglu = nn.Linear(dim, hidden_dim * (1 + swiglu)), swiglu

    def forward(self, x: Tensor) -> Tensor:
        if not self.swiglu:
            return F.gelu(self.proj(x), approximate="tanh")
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.silu(gate)


class FeedForward(nn.Module):
    """The transformer's MLP: `net.0` widens, with GELU or as SwiGLU, and `net.2` narrows."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        (dim, *_), swiglu = config.shape(), isinstance(config, RoutedConfig) and config.swiglu
        hidden_dim = int(dim * config.mlp_ratio)
        hidden_dim = int(2 / 3 * hidden_dim) if swiglu else hidden_dim
        first = Projection(dim, hidden_dim, swiglu)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Modulation(nn.Module):
    """adaLN-Zero's SiLU and linear; starts at zero, so that every block begins as the identity."""

    def __init__(self, dim: int, num: int):
        super().__init__()
        self.num = num
        self.linear = nn.Linear(dim, num * dim)

    def forward(self, c: Vector) -> Float[Tensor, "B num D"]:
        return self.linear(F.silu(c)).unflatten(-1, (self.num, -1))


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """adaLN: x (1 + scale) + shift, with (B, 1, D) shift and scale; x where there is no adaLN."""
    return x if shift is None or scale is None else torch.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor | None, out: Tensor) -> Tensor:
    """The residual x + gate out, with a (B, 1, D) gate; x + out where there is no adaLN."""
    return x + out if gate is None else torch.addcmul(x, gate, out)


def input_norm(config: RoutedConfig) -> nn.Module:
    """Norm before attention, MLP and output: modulation scales and shifts it, else it is an RMSNorm with weights."""
    dim = config.shape()[0]
    if config.modulation == "none":
        return rms_norm(dim)
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class PreNormBlock(nn.Module):
    """Self-attention and MLP, each after a norm: U-ViT's, and i1's text adapter (2606.11289)."""

    def __init__(
        self,
        config: TransformerConfig,
        norm: Callable[[int], nn.Module],
        skip: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__()
        dim, *_ = config.shape()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn, self.ff = Attention(config, qkv_bias), FeedForward(config)

    def forward(
        self, x: Float[Tensor, "B N _"], rope: Rope, attend: AttentionFunction, mask: Mask
    ) -> tuple[Tokens]:
        if self.skip_linear is not None:
            x = self.skip_linear(x)
        x = x + self.attn(self.norm1(x), attend, mask=mask, rope=rope)
        return (x + self.ff(self.norm2(x)),)


def kept_patches(scores: Float[Tensor, "B M"], span: Span) -> Int[Tensor, "B K"]:
    """The patches with the lowest scores, in order: of random scores, a random part of fixed size."""
    num_kept = scores.shape[1] - int(scores.shape[1] * span.ratio)
    return scores.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def kept_pixels(
    scores: Float[Tensor, "B M"], span: Span, patch_size: int, height: int, width: int
) -> Bool[Tensor, "B 1 h w"]:
    """Where `kept_patches` lie in the latent."""
    mask = torch.zeros_like(scores).scatter_(1, kept_patches(scores, span), 1.0)
    tokens = mask[..., None].expand(-1, -1, patch_size**2)
    return unpatchify(tokens, patch_size, height, width).bool()


def take(x: Tokens, places: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def put_back(whole: Tokens, places: Int[Tensor, "B K"], x: Float[Tensor, "B M D"]) -> Tokens:
    """`whole` with x's first K tokens at `places` and its registers, the rest, at the end."""
    num, registers = places.shape[1], x.shape[1] - places.shape[1]
    index = places[..., None].expand(-1, -1, x.shape[-1])
    patches = whole[:, : whole.shape[1] - registers].scatter(1, index, x[:, :num])
    return torch.cat([patches, x[:, num:]], dim=1)


class PatchTransformer(nn.Module):
    """What the transformers share: patches in and out, positions, registers, how blocks are run.

    A block takes one or more streams of tokens, RoPE's table, the attention and what else it is told; with a
    `skip_linear` it first merges what lies beside each stream (long skips, U-ViT 2209.12152). It returns the streams.
    """

    transform: Callable[..., tuple[Tensor, Tensor | None]]
    """What a subclass does: tokens, of which so many are patches, RoPE's table, vectors and conditions to predicted
    patches and the projection."""

    def __init__(self, config: TransformerConfig, timestep_shift: int = 0):
        super().__init__()
        self.config = config
        self.dim, self.depth, self.num_heads = config.shape()
        if not config.latent_channels:
            raise InputError("model.latent_channels: missing; it is the dataset's, or the codec's")
        self.patch_dim = config.patch_size**2 * config.latent_channels
        self.proj_in: nn.Module = nn.Linear(self.patch_dim, self.dim)
        if narrow := config.patch_bottleneck:  # JiT 2511.13720, 4.2
            first = nn.Linear(self.patch_dim, narrow, bias=False)
            self.proj_in = nn.Sequential(first, nn.Linear(narrow, self.dim))
        self.transformer_blocks = nn.ModuleList()
        self.registers = None
        if config.register_tokens:  # 2309.16588
            self.registers = nn.Parameter(torch.empty(config.register_tokens, self.dim))
            nn.init.normal_(self.registers, std=0.02)
        # REPA's three layers (2410.06940, A), in training alone: exported weights leave them out.
        self.projector, self.aligned = None, 0
        if isinstance(config, RoutedConfig) and config.alignment is not None:
            self.aligned = config.alignment_block()
            sizes = [self.dim, *[config.alignment.hidden_size] * 2, config.vision_dim or 0]
            first, second, third = (nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
            self.projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
        self.time_text_embed = self.text_blocks = None
        if getattr(config, "modulation", "") != "none":
            self.time_text_embed = ConditionEmbedder(config, self.dim, timestep_shift)
        if isinstance(config, RoutedConfig) and config.text_adapter:
            adapter = [PreNormBlock(config, rms_norm) for _ in range(config.text_adapter)]
            self.text_blocks = nn.ModuleList(adapter)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer_blocks)

    def positions(self, height: int, width: int, device: torch.device) -> Float[Tensor, "N D"]:
        extent = getattr(self.config, "position_extent", None)
        return positions_2d(height, width, self.dim, device, extent)

    def embed(self, x_t: Latents) -> tuple[Tokens, Rope]:
        """Tokens, registers last, and RoPE's table where the config has `rope` instead of fixed positions."""
        p = self.config.patch_size
        size = (x_t.shape[-2] // p, x_t.shape[-1] // p)
        x = self.proj_in(patchify(x_t, p).to(next(self.proj_in.parameters()).dtype))
        rope = None
        if self.config.rope:
            rope = rope_2d(*size, self.dim // self.num_heads, x.device)
        else:
            x = x + self.positions(*size, x.device).to(x.dtype)
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)
        return x, rope

    def forward(
        self, x_t: Latents, t: Float[Tensor, " B"], conditions: Conditions = Conditions()
    ) -> Latents | tuple[Latents, Float[Tensor, "B M V"]]:
        """Prediction for latents x_t at time t (0 data, 1 noise), in the network's dtype.

        In training with `alignment` also the projection of each patch, for the alignment loss.
        """
        check_inputs(x_t, t, conditions)
        vectors = self.time_text_embed(t, conditions) if self.time_text_embed is not None else []
        x, rope = self.embed(x_t)
        num = x.shape[1] - self.config.register_tokens
        x, projection = self.transform(x, num, rope, vectors, conditions)
        out = unpatchify(x, self.config.patch_size, *x_t.shape[-2:])
        return out if projection is None else (out, projection)

    def read(
        self, embedder: nn.Module | None, conditions: Conditions, like: Tokens
    ) -> tuple[Float[Tensor, "B L D"] | None, Mask]:
        """The text as `embedder` and the adapter's blocks, if there are any, leave it; and what attention may look at."""
        if embedder is None:
            return None, None
        text = embedder(given("text_emb", conditions.text_emb).to(like.dtype))
        mask = None if conditions.text_mask is None else conditions.text_mask[:, None, None]
        for block in self.text_blocks or ():
            (text,) = self.run(block, text, None, self.attend(text), mask)
        return text, mask

    def through(
        self,
        streams: tuple[Tensor, ...],
        num: int,
        rope: Rope,
        token_scores: Float[Tensor, "B M"] | None,
        told: tuple[Any, ...],
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B M V"] | None]:
        """Run all blocks in turn; with scores, the blocks of the config's span see the kept patches alone.

        Returns the patches, with which the first stream begins, and in training with `alignment` the projection of one
        block's.
        """
        attend, skips = self.attend(streams[0]), list[list[Tensor]]()
        x, *others = streams
        blocks: list[Any] = self.blocks
        num_skips = sum(block.skip_linear is not None for block in blocks)
        projection = span = None
        if token_scores is not None and isinstance(self.config, RoutedConfig):
            span = self.config.span
        whole, whole_rope, kept = x, rope, None
        for number, block in enumerate(blocks):
            if span and token_scores is not None and number == span.start:
                whole, whole_rope = x, rope
                kept = kept_patches(token_scores, span)  # (B, K)
                x = torch.cat([take(x, kept), x[:, num:]], dim=1)
                if rope is not None:
                    turns = rope.expand(len(x), -1, -1, -1).flatten(2)
                    turns = torch.cat([take(turns, kept), turns[:, num:]], dim=1)
                    rope = turns.unflatten(2, (-1, 2))
            if span and kept is not None and number == span.end:
                x, rope, kept = put_back(whole, kept, x), whole_rope, None
            entering = [x, *others]
            if block.skip_linear is not None:
                pairs = zip(entering, skips.pop(), strict=True)
                entering = [torch.cat(pair, dim=-1) for pair in pairs]
            x, *others = self.run(block, *entering, rope, attend, *told)
            if number < num_skips:
                skips.append([x, *others])
            if self.projector is not None and self.training and number + 1 == self.aligned:
                projection = self.projector(x)[:, :num]
        return (x if kept is None else put_back(whole, kept, x))[:, :num], projection

    def attend(self, x: Tensor) -> AttentionFunction:
        """The attention that the config asks for, if it runs on x's device and dtype."""
        return attention_backend(self.config.attention, x.device.type, x.dtype)

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def compile_blocks(model: Any, fullgraph: bool = True, backend: Any = "inductor") -> None:
    """Compile each block: those alike share a graph, which takes minutes less than the whole network."""
    # All blocks of a class count together: one graph per sort of block and of shape, with and without
    # a mask. Past the limit, 8 unless set, a whole graph is an error and any other falls back to eager.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for block in model.blocks:
        block.compile(fullgraph=fullgraph, backend=backend)


def initialise(model: PatchTransformer, zeros: list[nn.Module]) -> None:
    """Initialise as DiT: Xavier for linears, std 0.02 for embeddings of conditions, zero for modulation and `zeros`.

    Under muP every linear has the variance 1 / fan_in (2203.03466, table 8).
    """
    mup = model.config.mup_base_width is not None
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if mup:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for part in model.time_text_embed.modules() if model.time_text_embed is not None else ():
        if isinstance(part, nn.Embedding if mup else nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
    for module in (*zeros, *(m for m in model.modules() if isinstance(m, Modulation))):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
