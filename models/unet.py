"""UNet: diffusers' UNet2DConditionModel, SD 1.5 (2112.10752) and SDXL (2307.01952) shaped.

This module adds our signature and the zero initialisation that diffusers' class lacks.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from models.conditions import Conditions, check_inputs, given
from models.networks import UNetConfig


class UNet(nn.Module):
    """Text-conditioned; untrained it returns exactly zero. diffusers pads sides that do not halve evenly."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.unet = UNet2DConditionModel(**config.diffusers())
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.blocks = [
            m for m in self.modules() if isinstance(m, ResnetBlock2D | BasicTransformerBlock)
        ]
        # Like zero_module of the original: each residual begins as the identity.
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
        check_inputs(x_t, t, conditions)
        dtype = self.unet.conv_in.weight.dtype
        added = None
        if self.config.size_conditioning:
            assert self.config.latent_downscale is not None
            micro, scale = given("micro", conditions.micro), self.config.latent_downscale
            # Filled on the device: a tensor made from numbers would be copied there, and waited for.
            target = [micro.new_full((len(micro), 1), side * scale) for side in x_t.shape[-2:]]
            added = {
                "text_embeds": given("pooled", conditions.pooled),
                "time_ids": torch.cat([micro, *target], dim=1),
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
