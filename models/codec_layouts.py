"""How each class of diffusers' autoencoders gives latents and takes them back: one entry per class, no torch.

`flowmill export` writes this module into the pipeline of a model, so that both decode alike.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from models.config import Config, InputError

Vectors = tuple[list[float], list[float]]


class Normalisation(Config):
    """Latents are (raw - mean) / std, channel by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Layout:
    """AutoencoderKL, and what the others have in common; `config` is that of config.json.

    Pixels are (B, 3, H, W) in -1..1, raw latents (B, C, h, w), in the network's dtype.
    """

    deterministic: ClassVar[bool] = False
    """Whether it encodes to latents, and not to their mean and the logarithm of their variance."""
    needs: ClassVar[tuple[str, ...]] = ("block_out_channels",)
    """What config.json must have."""
    width: ClassVar[str] = "latent_channels"
    """Where config.json has the channels."""
    stored: ClassVar[str] = "float16"
    """dtype of moments in shards."""
    scaled: ClassVar[bool] = True
    """Whether config.json has one scaling_factor for all channels."""
    squares: ClassVar[int] = 1
    """The network's latents per side of one of ours, whose channels they are."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    @property
    def channels(self) -> int:
        return self.squares**2 * self.config[self.width]

    @property
    def downscale(self) -> int:
        """Pixels of a side per latent: the first of `needs` says it, or has an entry per halving and one more."""
        said = self.config[self.needs[0]]
        return said if isinstance(said, int) else self.squares * 2 ** (len(said) - 1)

    @property
    def only_side(self) -> int | None:
        """The one size of picture, square, that it takes; None: any that `downscale` divides."""
        return None

    def check_size(self, size: tuple[int, int], multiple: int) -> None:
        """Raise InputError where it gives no pictures of `size` (height, width), whose sides `multiple` must divide."""
        got, only = f"size: got {size[0]}x{size[1]}", self.only_side
        if only and size != (only, only):
            raise InputError(
                f"{got}, expected {only}x{only}, the only one that the codec takes. Remedy: leave it out"
            )
        if any(side % multiple for side in size):
            raise InputError(f"{got}, expected multiples of {multiple}")

    def mean_std(self, stored: Callable[[str], list[float]]) -> Vectors:
        """The mean and std of raw latents by channel; `stored` gives the fp32 values of one of its weights."""
        shift, scale = self.config.get("shift_factor"), self.config.get("scaling_factor")
        mean = self.config.get("latents_mean") or [float(shift or 0.0)] * self.channels
        std = self.config.get("latents_std") or [1.0] * self.channels
        return list(mean), [value / float(scale or 1.0) for value in std]

    def encode(self, network: Any, pixels: Any) -> tuple[Any, ...]:
        """Mean and log variance of raw latents, or where deterministic these alone."""
        posterior = network.encode(pixels).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, network: Any, raw: Any) -> Any:
        return network.decode(raw).sample


class KLFlux2(Layout):
    """FLUX.2's: squares of 2 x 2 latents are channels, normalised by a batch norm's statistics."""

    scaled = False
    squares = 2

    def mean_std(self, stored: Callable[[str], list[float]]) -> Vectors:
        variances, eps = stored("bn.running_var"), self.config["batch_norm_eps"]
        return stored("bn.running_mean"), [(variance + eps) ** 0.5 for variance in variances]

    def encode(self, network: Any, pixels: Any) -> tuple[Any, ...]:
        split = (
            t.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)) for t in super().encode(network, pixels)
        )
        return tuple(t.permute(0, 1, 3, 5, 2, 4).flatten(1, 3) for t in split)

    def decode(self, network: Any, raw: Any) -> Any:
        squares = raw.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)  # (B, C / 4, h, 2, w, 2)
        return super().decode(network, squares.flatten(4, 5).flatten(2, 3))


class KLQwenImage(Layout):
    """Qwen-Image's: a video's of one frame."""

    needs = ("dim_mult", "z_dim", "latents_mean", "latents_std")
    width = "z_dim"
    scaled = False

    def encode(self, network: Any, pixels: Any) -> tuple[Any, ...]:
        return tuple(t[:, :, 0] for t in super().encode(network, pixels[:, :, None]))

    def decode(self, network: Any, raw: Any) -> Any:
        return super().decode(network, raw[:, :, None])[:, :, 0]


class KLHunyuanImage(Layout):
    """HunyuanImage 2.1's."""

    needs = ("spatial_compression_ratio",)


class DC(Layout):
    """DC-AE, deterministic."""

    deterministic = True
    needs = ("encoder_block_out_channels",)
    answer: ClassVar[str] = "latent"

    def encode(self, network: Any, pixels: Any) -> tuple[Any, ...]:
        return (getattr(network.encode(pixels), self.answer),)


class Tiny(DC):
    """TAESD and its like: normalised latents of the codec that it imitates."""

    answer = "latents"


class RAE(DC):
    """A frozen vision transformer and a decoder (2510.11690): normalises inside, of pixels in 0..1."""

    needs = ("patch_size", "encoder_hidden_size", "encoder_input_size", "encoder_patch_size")
    width = "encoder_hidden_size"
    scaled = False

    @property
    def only_side(self) -> int | None:
        patches = self.config["encoder_input_size"] // self.config["encoder_patch_size"]
        return patches * self.downscale

    def mean_std(self, stored: Callable[[str], list[float]]) -> Vectors:
        return [0.0] * self.channels, [1.0] * self.channels

    def encode(self, network: Any, pixels: Any) -> tuple[Any, ...]:
        return super().encode(network, (pixels + 1) / 2)

    def decode(self, network: Any, raw: Any) -> Any:
        return super().decode(network, raw) * 2 - 1


class Pixels(DC):
    """No network: the pictures themselves, 0..255."""

    needs = ("downscale",)
    width = "channels"
    stored = "uint8"
    scaled = False

    def __init__(self, config: Mapping[str, Any]):
        super().__init__({"channels": 3, "downscale": 1})

    def mean_std(self, stored: Callable[[str], list[float]]) -> Vectors:
        return [127.5] * 3, [127.5] * 3

    def encode(self, network: Any, pixels: Any) -> tuple[Any, ...]:
        return (((pixels + 1) * 127.5).round(),)

    def decode(self, network: Any, raw: Any) -> Any:
        return raw / 127.5 - 1


PIXELS = "pixels"
LAYOUTS: dict[str, type[Layout]] = {
    "AutoencoderKL": Layout,
    "AutoencoderKLFlux2": KLFlux2,
    "AutoencoderKLQwenImage": KLQwenImage,
    "AutoencoderKLHunyuanImage": KLHunyuanImage,
    "AutoencoderDC": DC,
    "AutoencoderTiny": Tiny,
    "AutoencoderRAE": RAE,
    PIXELS: Pixels,
}
