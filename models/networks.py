"""What the config of every network has, whatever its architecture. Torch-free."""

from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import Field, model_validator

from models.config import Config, InputError

NetworkType = TypeVar("NetworkType", bound="NetworkConfig")


class NetworkConfig(Config):
    """Sizes that the data fixes default to the dataset's."""

    kind: Any
    """The network's name in the registry of `models`."""
    size: Any
    """A name of the network's own table of sizes."""
    init_from: str | None = None
    """Weights to begin with: a diffusers folder, or a .safetensors or .pt file of this network or the original DiT."""
    size_conditioning: bool = False
    """The network is told the picture's original size and crop, as SDXL (2307.01952, 2.2)."""
    gradient_checkpointing: bool = False
    latent_channels: int | None = None
    """Channels of a latent, the dataset's where left out."""
    text_dim: int | None = None
    """Width of the text tokens, the dataset's where left out; 0: none."""
    pooled_dim: int | None = None
    """Width of the pooled text, the dataset's where left out; 0: none."""
    num_classes: int = 0
    """Classes of the dataset; one more is added, for no class."""

    @property
    def latent_multiple(self) -> int:
        """What the sides of a latent must be a multiple of."""
        return 1

    def with_sizes(self: NetworkType, sizes: dict[str, Any]) -> NetworkType:
        """This config, with what it leaves open taken from `sizes`."""
        missing = {k: v for k, v in sizes.items() if getattr(self, k, v) is None}
        return self.model_copy(update=missing)


class TransformerConfig(NetworkConfig):
    """A size by name, any part of it overridden."""

    SIZES: ClassVar[dict[str, tuple[int, int, int]]]  # hidden_size, depth, num_heads

    hidden_size: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    patch_size: int = Field(default=2, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    qk_norm: bool = False
    rope: bool = False
    """Rotary positions in place of fixed ones."""
    register_tokens: int = Field(default=0, ge=0)
    """Tokens that stand for no patch (2309.16588)."""
    attention: Literal["sdpa", "xformers", "flash"] = "sdpa"
    mup_base_width: int | None = Field(default=None, gt=0)
    """muP (2203.03466) for Adam: tune at this width, train at another with the same lr and heads as wide."""

    @property
    def latent_multiple(self) -> int:
        return self.patch_size

    def at_base_width(self) -> "TransformerConfig":
        """The same network at `mup_base_width`; raises InputError where its heads would differ in width."""
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
        """hidden_size, depth, num_heads, checked."""
        hidden, depth, heads = self.SIZES[self.size]
        hidden, depth = self.hidden_size or hidden, self.depth or depth
        heads = self.num_heads or heads
        if hidden % (4 * heads):
            raise InputError(
                f"model.hidden_size: got {hidden}, expected a multiple of {4 * heads} (4 x num_heads)"
            )
        return hidden, depth, heads


class RoutingConfig(Config):
    """TREAD (2501.04765): in training, a random part of the tokens goes around some blocks unchanged."""

    ratio: float = Field(default=0.5, gt=0, lt=1)
    """Share of the tokens that go around."""
    start: int = Field(default=2, ge=0)
    """The first block that they go around."""
    end: int = -4
    """The first block that all tokens enter again; negative counts from the last."""


class MaskingConfig(Config):
    """Deferred masking (2407.15811): the first blocks mix all patches, then training drops most of them.

    The loss is over the kept ones. Fine-tune without it at the end, as the paper does.
    """

    ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that are dropped."""
    mixer_depth: int = Field(default=4, gt=0)
    """Blocks that mix all patches, beside `depth`."""


class AlignmentConfig(Config):
    """REPA (2410.06940): patches after a block, projected, learn to look like a frozen ViT's of the clean picture.

    Needs a dataset prepared with `vision_encoder`.
    """

    block: int = Field(default=8, gt=0)
    """After how many blocks patches are aligned; 8 of XL's 28 in the paper."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of 1 - cosine similarity in the loss."""
    hidden_size: int = Field(default=2048, gt=0)
    """Width of the projection's three layers."""
    until_images: int | None = Field(default=None, gt=0)
    """After so many pictures there is no more alignment (2505.16792); null: always."""


class Span(NamedTuple):
    """Blocks start to end run on 1 - ratio of the patches."""

    start: int
    end: int
    ratio: float

    def num_kept(self, num_patches: int) -> int:
        return num_patches - int(num_patches * self.ratio)


class RoutedConfig(TransformerConfig):
    """Networks whose blocks may run on a part of the patches, which `token_scores` choose."""

    routing: RoutingConfig | None = None
    masking: MaskingConfig | None = None
    alignment: AlignmentConfig | None = None
    vision_dim: int | None = None
    """Width of the vision encoder's features, the dataset's where left out; 0: none."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "RoutedConfig":
        if self.routing and self.masking:
            raise ValueError("routing and masking: expected one of them, got both")
        return self

    def shape(self) -> tuple[int, int, int]:
        hidden, depth, heads = super().shape()
        return hidden, depth + (self.masking.mixer_depth if self.masking else 0), heads

    def alignment_block(self) -> int:
        """After how many blocks patches are aligned, 0 for never; raises InputError where not all are there."""
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
        """Which blocks do not see all patches; raises InputError where there are no such."""
        depth = self.shape()[1]
        if self.masking:
            return Span(self.masking.mixer_depth, depth, self.masking.ratio)
        if self.routing is None:
            return None
        start, end = self.routing.start, self.routing.end
        end += depth if end < 0 else 0
        if not start < end <= depth:
            raise InputError(
                f"model.routing: got blocks {start} to {end}, expected some of {depth}"
            )
        return Span(start, end, self.routing.ratio)
