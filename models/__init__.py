"""Networks and frozen encoders. The one registry; a class is imported when it is built, so that
importing a module of this package does not import every other."""

import importlib
import logging
from typing import Any

# diffusers imports it, and it then says at length which torch it was built for. Where its attention is
# asked for and does not run, `attention_backend` says so in a line.
logging.getLogger("xformers").setLevel(logging.ERROR)

MODELS = {
    "dit": ("models.dit", "DiT"),
    "mmdit": ("models.mmdit", "MMDiT"),
    "uvit": ("models.uvit", "UViT"),
    "unet": ("models.unet", "UNet"),
}


def config_class(kind: str) -> Any:
    """The class of a network's config, named as the network's own; all of them are read without torch."""
    return getattr(importlib.import_module("models.networks"), f"{MODELS[kind][1]}Config")


def build_model(config: Any) -> Any:
    """The network that `config.kind` names, on whatever device is torch's default."""
    module, name = MODELS[config.kind]
    return getattr(importlib.import_module(module), name)(config)
