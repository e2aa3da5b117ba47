"""The configs of the networks, read without torch: what all have, and what each has of its own."""

from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import Field, model_validator

from models.config import Config, InputError, Place

NetworkType = TypeVar("NetworkType", bound="NetworkConfig")
RoutedType = TypeVar("RoutedType", bound="RoutedConfig")

SIZE_FOR = {"latent_downscale": "size_conditioning", "vision_dim": "alignment"}
"""Sizes that a single option reads; without it they are left open, and one that is given has no effect."""

FIXED_POSITIONS = {"position_extent", "position_grid", "learned_positions", "text_rope"}
"""Options that have no effect with RoPE instead."""


class NetworkConfig(Config):
    """What every network has; sizes that the data fixes default to the dataset's."""

    kind: Any
    """The network's name in MODELS."""
    size: Any
    """A name in the network's table of sizes."""
    init_from: Place | None = None
    """Weights to start from: a diffusers folder, or a .safetensors or .pt file of this network or the original DiT."""
    size_conditioning: bool = False
    """The network is told the picture's original size and crop, as SDXL (2307.01952, 2.2)."""
    gradient_checkpointing: bool = False
    latent_channels: int | None = None
    """Channels of a latent; the dataset's where left out."""
    text_dim: int | None = None
    """Width of the text tokens, 0 for none; the dataset's where left out."""
    pooled_dim: int | None = None
    """Width of the pooled text, 0 for none; the dataset's where left out."""
    num_classes: int = Field(default=0, ge=0)
    """Classes of the dataset; the network adds one, for no class."""

    @model_validator(mode="after")
    def _sizes_have_effect(self) -> "NetworkConfig":
        for name, option in SIZE_FOR.items():
            if getattr(self, name, None) is not None and not getattr(self, option):
                raise ValueError(f"{name}: no effect without {option}")
        return self

    @property
    def latent_multiple(self) -> int:
        """The number of which the sides of a latent must be multiples."""
        return 1

    def check_shape(self) -> None:
        """Raise InputError where the network cannot be built, whatever the data."""

    def with_sizes(self: NetworkType, sizes: dict[str, Any]) -> NetworkType:
        """This config with the values of `sizes` where it has none and an option reads them."""
        missing = {k: v for k, v in sizes.items() if getattr(self, k, v) is None}
        read = {k: v for k, v in missing.items() if getattr(self, SIZE_FOR.get(k, "size"))}
        return self.model_copy(update=read)


class TransformerConfig(NetworkConfig):
    """A size by name, of which any part can be overridden."""

    SIZES: ClassVar[dict[str, tuple[int, int, int]]]
    """hidden_size, depth and num_heads by name."""
    hidden_size: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    patch_size: int = Field(default=2, gt=0)
    patch_bottleneck: int | None = Field(default=None, gt=0)
    """Width that patches pass through on their way in; for large patches of pixels (JiT 2511.13720)."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    qk_norm: bool = False
    rope: bool = False
    """Rotary positions instead of fixed ones."""
    register_tokens: int = Field(default=0, ge=0)
    """Number of tokens that are no patches (2309.16588)."""
    attention: Literal["sdpa", "xformers", "flash"] = "sdpa"
    mup_base_width: int | None = Field(default=None, gt=0)
    """muP (2203.03466) for Adam: the lr tuned at this width serves any width with heads of the same width."""

    @property
    def latent_multiple(self) -> int:
        return self.patch_size

    def at_base_width(self) -> "TransformerConfig":
        """The same network at `mup_base_width`; raises InputError where the width of its heads would change."""
        assert self.mup_base_width is not None
        hidden, _, heads = self.shape()
        base_heads, rest = divmod(heads * self.mup_base_width, hidden)
        if rest or not base_heads:
            raise InputError(
                f"model.mup_base_width: got {self.mup_base_width}, expected a multiple of {hidden // heads}, "
                "the width of a head"
            )
        return self.model_copy(update={"hidden_size": self.mup_base_width, "num_heads": base_heads})

    def shape(self) -> tuple[int, int, int]:
        """hidden_size, depth and num_heads; raises InputError where they do not fit."""
        given = self.hidden_size, self.depth, self.num_heads
        hidden, depth, heads = (g or s for g, s in zip(given, self.SIZES[self.size], strict=True))
        if getattr(self, "long_skips", False) and depth % 2 == 0:
            raise InputError(f"model.depth: got {depth}, expected an odd number with long skips")
        if hidden % (4 * heads):
            raise InputError(
                f"model.hidden_size: got {hidden}, expected a multiple of {4 * heads} (4 x num_heads)"
            )
        return hidden, depth, heads

    def check_shape(self) -> None:
        self.shape()
        if self.mup_base_width is not None:
            self.at_base_width()


class RoutingConfig(Config):
    """TREAD (2501.04765): in training, random patches bypass some blocks unchanged."""

    ratio: float = Field(default=0.5, gt=0, lt=1)
    """Share of the patches that bypass the blocks."""
    start: int = Field(default=2, ge=0)
    """The first block that they bypass."""
    end: int = -4
    """The first block that all patches enter again; a negative number counts from the last."""


class MaskingConfig(Config):
    """Deferred masking (2407.15811): the first blocks mix all patches, then training drops most of them.

    The loss covers the kept ones. The paper fine-tunes without masking at the end.
    """

    ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches to drop."""
    mixer_depth: int = Field(default=4, gt=0)
    """Number of blocks that mix all patches, in addition to `depth`."""


class AlignmentConfig(Config):
    """REPA (2410.06940): projected features of a block learn to match those of a frozen ViT for the clean picture.

    The dataset must have been prepared with `vision_encoder`.
    """

    block: int = Field(default=8, gt=0)
    """The number of blocks after which patches are aligned; 8 of XL's 28 in the paper."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of 1 - cosine similarity in the loss."""
    hidden_size: int = Field(default=2048, gt=0)
    """Width of the projection's three layers."""
    until_images: int | None = Field(default=None, gt=0)
    """Number of pictures after which alignment ends (2505.16792); null for never."""


class Span(NamedTuple):
    """Blocks start to end - 1 see 1 - ratio of the patches."""

    start: int
    end: int
    ratio: float


class RoutedConfig(TransformerConfig):
    """Networks whose blocks can run on some of the patches, chosen by `token_scores`."""

    routing: RoutingConfig | None = None
    masking: MaskingConfig | None = None
    alignment: AlignmentConfig | None = None
    vision_dim: int | None = None
    """Width of the vision encoder's features, 0 for none; the dataset's where left out."""
    # Parts of the recipe i1 (2606.11289), each of which serves alone.
    modulation: Any
    """adaLN per block, PixArt's shared one (dit), or none, which leaves it to the latents to tell t (2502.13129)."""
    sandwich_norm: bool = False
    """Norms what attention and MLP return, before it is added (CogView 2105.13290)."""
    swiglu: bool = False
    """MLPs gated by SiLU, two thirds as wide, which makes as many weights (2002.05202)."""
    long_skips: bool = False
    """Each block of the second half also sees what its mirror in the first returned (U-ViT 2209.12152); depth is odd."""
    text_adapter: int = Field(default=0, ge=0)
    """Number of transformer blocks that the text alone passes through first; 2 in i1."""

    @model_validator(mode="after")
    def _has_effect(self) -> "RoutedConfig":
        for name in ("pooled_dim", "num_classes", "size_conditioning", "timestep_shift"):
            if self.modulation == "none" and getattr(self, name, None):
                raise ValueError(f"{name} has no effect with modulation none. Remedy: remove one")
        for name in ("routing", "long_skips") if self.masking else ():
            if getattr(self, name):
                raise ValueError(f"{name} and masking: expected one of them, got both")
        fields = type(self).model_fields
        for name in FIXED_POSITIONS & fields.keys() if self.rope else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect with rope. Remedy: remove one")
        return self

    def with_sizes(self: RoutedType, sizes: dict[str, Any]) -> RoutedType:
        return super().with_sizes(sizes | ({"pooled_dim": 0} if self.modulation == "none" else {}))

    def shape(self) -> tuple[int, int, int]:
        hidden, depth, heads = super().shape()
        return hidden, depth + (self.masking.mixer_depth if self.masking else 0), heads

    def check_shape(self) -> None:
        super().check_shape()
        _ = self.span, self.with_sizes({"vision_dim": 1}).alignment_block()

    def alignment_block(self) -> int:
        """The number of blocks after which patches are aligned, 0 for none; raises InputError where some are missing."""
        if self.alignment is None:
            return 0
        block, depth, span = self.alignment.block, self.shape()[1], self.span
        if block > depth or (span and span.start < block <= span.end):
            raise InputError(
                f"model.alignment.block: got {block}, expected one of {depth} after which all patches are there"
            )
        if not self.vision_dim:
            raise InputError(
                "model.alignment: the dataset has no features to align with. Remedy: prepare it with vision_encoder"
            )
        return block

    @property
    def span(self) -> Span | None:
        """The blocks that do not see all patches; raises InputError where the depth does not allow them."""
        depth = self.shape()[1]
        if self.masking:
            return Span(self.masking.mixer_depth, depth, self.masking.ratio)
        if self.routing is None:
            return None
        start, end = self.routing.start, self.routing.end
        end += depth if end < 0 else 0
        if self.long_skips and start + end != depth:
            raise InputError(
                f"model.routing.end: got {end} of {depth} blocks, expected {depth - start}: with long_skips a "
                "block and its mirror see the same patches"
            )
        if not start < end <= depth:
            raise InputError(
                f"model.routing: got blocks {start} to {end}, expected some of {depth}"
            )
        return Span(start, end, self.routing.ratio)


class DiTConfig(RoutedConfig):
    # S to XL are those of the paper's table 1.
    SIZES: ClassVar = {
        "debug": (64, 2, 2),
        "tiny": (256, 6, 4),
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "XL": (1152, 28, 16),
    }
    kind: Literal["dit"] = "dit"
    size: Literal["debug", "tiny", "S", "B", "L", "XL"] = "B"
    modulation: Literal["block", "shared", "none"] = "block"
    position_extent: float | None = None
    """Positions run from 0 to this, like PixArt's; null counts patches."""
    timestep_shift: Literal[0, 1] = 0
    """Shift of t's frequencies: 1 in diffusers' DiT, 0 everywhere else."""


class MMDiTConfig(RoutedConfig):
    # The width is 64 x depth, as in the paper; sd3 is the medium size of SD3 and SD3.5.
    SIZES: ClassVar = {
        "debug": (64, 2, 2),
        "tiny": (256, 6, 4),
        "B": (768, 12, 12),
        "L": (1152, 18, 18),
        "sd3": (1536, 24, 24),
        "sd3.5-large": (2432, 38, 38),
    }
    kind: Literal["mmdit"] = "mmdit"
    modulation: Literal["block", "none"] = "block"
    size: Literal["debug", "tiny", "B", "L", "sd3", "sd3.5-large"] = "B"
    dual_attention_layers: int = Field(default=0, ge=0)
    """Number of blocks, counted from the first, with a second attention; 13 in SD3.5 medium."""
    position_grid: int = Field(default=192, gt=0)
    """Positions are the middle of a square of this many patches per side; a larger latent is an error."""
    position_extent: float = Field(default=64.0, gt=0)
    """The square's positions run from 0 to this."""
    learned_positions: bool = False
    """Train the positions, which start from the fixed ones."""
    text_rope: bool = False
    """Rotary positions beside the fixed ones: half of a head turns by place in the text, after which all patches come,
    a quarter by row and a quarter by column (i1 2606.11289)."""


class UViTConfig(TransformerConfig):
    # S to H are those of the paper's table 1. depth includes the middle block, so it is odd.
    SIZES: ClassVar = {
        "debug": (64, 3, 2),
        "tiny": (256, 7, 4),
        "S": (512, 13, 8),
        "M": (768, 17, 12),
        "L": (1024, 21, 16),
        "H": (1152, 29, 16),
    }
    kind: Literal["uvit"] = "uvit"
    size: Literal["debug", "tiny", "S", "M", "L", "H"] = "M"
    long_skips: ClassVar[bool] = True


# Channels, transformer layers (0 for none) and heads, one value per level; then the ResNets per level.
UNET_SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]] = {
    "debug": ((32, 64), (0, 1), (2, 2), 1),
    "tiny": ((64, 128, 256), (0, 1, 1), (4, 4, 4), 1),
    "sd15": ((320, 640, 1280, 1280), (1, 1, 1, 0), (8, 8, 8, 8), 2),
    "sdxl": ((320, 640, 1280), (0, 2, 10), (5, 10, 20), 2),
}


class UNetConfig(NetworkConfig):
    kind: Literal["unet"] = "unet"
    size: Literal["debug", "tiny", "sd15", "sdxl"] = "sd15"
    latent_downscale: int | None = Field(default=None, gt=0)
    """Pixels per latent pixel; the dataset's where left out. Here size_conditioning is SDXL's "text_time": pooled text
    and six numbers, of which the last two are the picture's size, the latent's times this."""

    def diffusers(self) -> dict[str, Any]:
        """Arguments of diffusers' class; raises InputError where it lacks one."""
        channels, layers, heads, resnets = UNET_SIZES[self.size]
        if not self.latent_channels:
            raise InputError("model.latent_channels: missing; it is the dataset's, or the codec's")
        if not self.text_dim:
            raise InputError("model.text_dim: got none, but unet needs text tokens")
        cross = ["CrossAttn" if n else "" for n in layers]
        arguments: dict[str, Any] = {
            "in_channels": self.latent_channels,
            "out_channels": self.latent_channels,
            "block_out_channels": channels,
            "layers_per_block": resnets,
            "down_block_types": tuple(f"{c}DownBlock2D" for c in cross),
            "up_block_types": tuple(f"{c}UpBlock2D" for c in cross[::-1]),
            "transformer_layers_per_block": tuple(n or 1 for n in layers),
            # diffusers' name for the number of heads.
            "attention_head_dim": heads,
            "cross_attention_dim": self.text_dim,
            "use_linear_projection": self.size != "sd15",
            "norm_num_groups": min(32, channels[0] // 2),
            "num_class_embeds": self.num_classes + 1 if self.num_classes else None,
        }
        if self.size == "sd15":
            arguments |= {"transformer_layers_per_block": 1, "attention_head_dim": 8}
        if self.size_conditioning:
            if not (self.pooled_dim and self.latent_downscale):
                raise InputError(
                    "model.size_conditioning: unet needs pooled_dim and latent_downscale too"
                )
            arguments |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": self.pooled_dim + 6 * 256,
            }
        return arguments


MODELS: dict[str, tuple[type[NetworkConfig], str, str]] = {
    "dit": (DiTConfig, "models.dit", "DiT"),
    "mmdit": (MMDiTConfig, "models.mmdit", "MMDiT"),
    "uvit": (UViTConfig, "models.uvit", "UViT"),
    "unet": (UNetConfig, "models.unet", "UNet"),
}
"""Each kind of network: its config, and the module and name of its class, which is imported when it is built."""


def config_class(kind: str) -> Any:
    return MODELS[kind][0]


def build_model(config: Any) -> Any:
    """The network that `config.kind` names, on whatever device is torch's default."""
    _, module, name = MODELS[config.kind]
    return getattr(import_module(module), name)(config)
