"""Networks and frozen encoders. The one registry; a class is imported when it is built, so that
importing a module of this package does not import every other."""

import importlib
from typing import Any

MODELS = {
    "dit": ("models.dit", "DiT"),
    "mmdit": ("models.mmdit", "MMDiT"),
    "uvit": ("models.uvit", "UViT"),
    "unet": ("models.unet", "UNet"),
}


def build_model(config: Any) -> Any:
    """The network that `config.kind` names, on whatever device is torch's default."""
    module, name = MODELS[config.kind]
    return getattr(importlib.import_module(module), name)(config)
