"""Pieces that the transformers share: patches, positions, timestep embedding, attention, MLP, modulation.

Parameter names follow diffusers' where the maths is the same, so that weights carry over.
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


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


def sinusoid(x: Float[Tensor, "*S"], dim: int, max_period: float = 1e4) -> Float[Tensor, "*S D"]:
    """cos then sin at `dim`/2 geometric frequencies, fp32 whatever the network's dtype.

    At 1000 t in bf16 the argument would be off by up to 2 radians.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=x.device)
    angles = x.float()[..., None] * torch.exp(-math.log(max_period) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=64)
def positions_2d(height: int, width: int, dim: int, device: torch.device) -> Float[Tensor, "N D"]:
    """Fixed sine-cosine position of each patch of a height x width grid (MAE 2111.06377, DiT).

    First half of the features is the column, second the row; sin then cos in each. A table stays
    cached for each shape, since buckets recur.
    """
    quarter = dim // 4
    omega = 1.0 / 1e4 ** (torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64, device=device),
        torch.arange(width, dtype=torch.float64, device=device),
        indexing="ij",
    )
    halves = []
    for axis in (column, row):
        angles = axis.reshape(-1, 1) * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


class MLPEmbedder(nn.Module):
    """Two linear layers with an activation between: for t, pooled text, caption tokens."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.act = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x.to(self.linear_1.weight.dtype))))


class TimestepEmbedder(MLPEmbedder):
    """t in [0, 1] -> vector: sinusoid of 1000 t in fp32, then an MLP."""

    def __init__(self, dim: int, frequency_dim: int = 256):
        super().__init__(frequency_dim, dim, nn.SiLU())
        self.frequency_dim = frequency_dim

    def forward(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        if x.dtype != torch.float32:
            raise TypeError(f"t: got {x.dtype}, expected torch.float32: lower precision loses time")
        return super().forward(sinusoid(1000.0 * x, self.frequency_dim))


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's scaled dot-product attention; q, k, v (B, L, heads, d), mask (B, 1, 1, L_k) bool."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """xformers' memory-efficient attention; same arguments as `sdpa`."""
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:
        # Its kernels want the bias's rows aligned to 8: allocate wider, then cut.
        length = k.shape[1]
        wide = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], -(-length // 8) * 8)
        bias = wide[..., :length].masked_fill_(~mask, float("-inf"))
    return memory_efficient_attention(q, k, v, attn_bias=bias)


ATTENTION: dict[str, AttentionFunction] = {"sdpa": sdpa, "xformers": xformers}


@lru_cache
def attention_backend(name: str, device_type: str, dtype: torch.dtype) -> AttentionFunction:
    """The backend of that name if a tiny call of it runs on this device, else SDPA with one warning."""
    if name == "sdpa":
        return sdpa
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
    """Multi-head attention, on itself or across `context_dim`; QK-norm is RMSNorm a head (2302.05442)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        context_dim: int | None = None,
        qk_norm: bool = False,
        backend: str = "sdpa",
    ):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(context_dim or dim, dim)
        self.to_v = nn.Linear(context_dim or dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        head_dim = dim // num_heads
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B L E"] | None = None,
        mask: Bool[Tensor, "B 1 1 L"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        source = x if context is None else context
        q, k, v = (
            f(y).unflatten(-1, (self.num_heads, -1))
            for f, y in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        run = attention_backend(self.backend, x.device.type, x.dtype)
        out = run(self.norm_q(q), self.norm_k(k), v, mask)
        return self.to_out[0](out.flatten(2))


class GELUProjection(nn.Module):
    """Linear then tanh GELU; a module of its own only for diffusers' parameter names."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The transformer's MLP, `net.0` up with GELU and `net.2` down."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.net = nn.ModuleList(
            [GELUProjection(dim, hidden_dim), nn.Identity(), nn.Linear(hidden_dim, dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x (1 + scale) + shift, with (B, 1, D) shift and scale."""
    return x * (1 + scale) + shift
