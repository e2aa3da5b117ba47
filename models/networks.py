"""What the config of every network has, whatever its architecture. Torch-free."""

from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from models.config import Config, InputError

NetworkType = TypeVar("NetworkType", bound="NetworkConfig")


class NetworkConfig(Config):
    """Sizes that the data fixes default to the dataset's."""

    size_conditioning: bool = False  # original size and crop, as SDXL (2307.01952, 2.2)
    gradient_checkpointing: bool = False
    # The dataset's, where left out.
    latent_channels: int | None = None
    text_dim: int | None = None  # 0: none
    pooled_dim: int | None = None  # 0: none
    num_classes: int = 0  # one more is added, for no class

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

    size: str
    hidden_size: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    patch_size: int = Field(default=2, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    qk_norm: bool = False
    rope: bool = False  # instead of fixed positions
    register_tokens: int = Field(default=0, ge=0)  # 2309.16588
    attention: Literal["sdpa", "xformers", "flash"] = "sdpa"

    @property
    def latent_multiple(self) -> int:
        return self.patch_size

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
