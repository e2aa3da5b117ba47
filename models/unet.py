"""UNet: diffusers' UNet2DConditionModel, SD 1.5 (2112.10752) and SDXL (2307.01952) shaped.

Here are its size table, our signature and the zero initialisation that diffusers' class lacks.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from models.conditions import Conditions, check_shapes, given
from models.config import InputError
from models.networks import NetworkConfig

# By level: channels, transformer layers (0: none) and heads; then ResNets per level.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]] = {
    "debug": ((32, 64), (0, 1), (2, 2), 1),
    "tiny": ((64, 128, 256), (0, 1, 1), (4, 4, 4), 1),
    "sd15": ((320, 640, 1280, 1280), (1, 1, 1, 0), (8, 8, 8, 8), 2),
    "sdxl": ((320, 640, 1280), (0, 2, 10), (5, 10, 20), 2),
}


class UNetConfig(NetworkConfig):
    kind: Literal["unet"] = "unet"
    size: Literal["debug", "tiny", "sd15", "sdxl"] = "sd15"
    latent_downscale: int | None = Field(default=None, gt=0)
    """Pixels per latent pixel, the dataset's where left out. size_conditioning is SDXL's "text_time": pooled text and
    six numbers, of which the last two are the picture's own size, the latent's times this."""

    def diffusers(self) -> dict[str, Any]:
        """Arguments of diffusers' class; raises InputError where it has no such network."""
        channels, layers, heads, resnets = SIZES[self.size]
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
            "attention_head_dim": heads,  # diffusers' name for the number of heads
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


class UNet(nn.Module):
    """Text-conditioned; untrained it returns exactly zero. Sides that halve unevenly are diffusers' to pad."""

    def __init__(self, config: UNetConfig):
        # Here, since reading a config needs none of it.
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_2d import Transformer2DModel
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        super().__init__()
        self.config = config
        self.unet = UNet2DConditionModel(**config.diffusers())
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        kinds = (ResnetBlock2D, BasicTransformerBlock)
        self.blocks = [m for m in self.modules() if isinstance(m, kinds)]
        # As the original's zero_module: each residual begins as the identity.
        last: list[nn.Module] = [self.unet.conv_out]
        last += [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock2D)]
        last += [m.proj_out for m in self.modules() if isinstance(m, Transformer2DModel)]
        for parameter in (p for module in last for p in module.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: Float[Tensor, " B"],
        conditions: Conditions = Conditions(),
    ) -> Float[Tensor, "B C h w"]:
        """Prediction for latents x_t at time t (0 data, 1 noise), in the network's dtype."""
        check_shapes(x_t, t, *conditions)
        if t.dtype != torch.float32:
            raise TypeError(f"t: got {t.dtype}, expected torch.float32: lower precision loses time")
        dtype = self.unet.conv_in.weight.dtype
        added = None
        if self.config.size_conditioning:
            assert self.config.latent_downscale is not None
            sides = torch.tensor(x_t.shape[-2:], device=x_t.device) * self.config.latent_downscale
            target = sides.expand(len(x_t), 2)
            added = {
                "text_embeds": given("pooled", conditions.pooled),
                "time_ids": torch.cat([given("micro", conditions.micro), target], dim=1),
            }
        return self.unet(
            x_t.to(dtype),
            1000.0 * t,
            given("text_emb", conditions.text_emb).to(dtype),
            class_labels=given("label", conditions.label) if self.config.num_classes else None,
            encoder_attention_mask=conditions.text_mask,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
