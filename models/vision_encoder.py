"""Frozen vision transformers: pictures to a grid of features, for representation alignment (REPA)."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models import weights
from models.numerics import tf32

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionEncoder:
    """A transformers ViT in a local folder, frozen; one of its patches covers `patch_pixels` squared. Raises InputError.

    Its grid is then that of a network whose patch, times the codec's downscale, is `patch_pixels`: DINOv2's
    patches of 14 see a picture of 256 as one of 224 (REPA, Yu et al. 2410.06940, 4.1).
    """

    def __init__(
        self,
        path: str | Path,
        patch_pixels: int,
        dtype: weights.EncoderDtype = "fp32",
        device: str | torch.device = "cpu",
    ):
        self.path, self.patch_pixels, self.dtype = Path(path), patch_pixels, dtype
        family = weights.VISION_ENCODERS[weights.read_vision_config(self.path)["model_type"]]
        self.network = weights.load_network("transformers", family, self.path, dtype).to(device)
        config = self.network.config
        self.dim: int = config.hidden_size
        self._patch: int = config.patch_size
        self._prefix = 1 + getattr(config, "num_register_tokens", 0)
        settings = self.path / "preprocessor_config.json"
        said = json.loads(settings.read_text()) if settings.is_file() else {}
        values = [said.get("image_mean", IMAGENET_MEAN), said.get("image_std", IMAGENET_STD)]
        self._mean, self._std = torch.tensor(values, device=device).view(2, 1, 3, 1, 1)

    @torch.inference_mode()
    def encode(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D g j"]:
        """fp32 features of the last layer; g = H / patch_pixels, j = W / patch_pixels."""
        grid = [side // self.patch_pixels for side in images.shape[2:]]
        pixels = images.to(self.network.device).float() / 255
        pixels = torch.nn.functional.interpolate(
            pixels, size=[side * self._patch for side in grid], mode="bicubic", antialias=True
        )
        pixels = ((pixels - self._mean) / self._std).to(self.network.dtype)
        # DINOv2 fits its positions to any size unasked.
        vit = self.network.config.model_type == "vit"
        asked = {"interpolate_pos_encoding": True} if vit else {}
        with tf32(self.dtype == "tf32"):
            hidden = self.network(pixels, **asked).last_hidden_state[:, self._prefix :]
        return hidden.float().transpose(1, 2).unflatten(2, grid).contiguous()

    def record(self) -> dict[str, Any]:
        """The fields of the VisionRecord that a dataset made with this encoder has."""
        return {
            "family": type(self.network).__name__,
            "path": str(self.path),
            "weights_sha256": weights.weights_sha256(self.path),
            "dtype": self.dtype,
            "dim": self.dim,
            "patch_pixels": self.patch_pixels,
        }
