"""What a config means for the encoders: their weights, the buckets that fit them, what an actor is made with."""

from pathlib import Path
from typing import Any, TypeVar

from data_prep.config import INDECISIVE, PrepareConfig
from data_prep.encode import EncoderSettings, TextEncoderConfig, VaeConfig, VisionEncoderConfig
from data_prep.storage import absolute
from models.config import InputError
from models.weights import read_model_config, weights_sha256

Section = TypeVar("Section", VaeConfig, TextEncoderConfig, VisionEncoderConfig)


def check_settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the result, the encoders' weights included; raises InputError where one is not there."""
    folders = {"vae": (config.vae.path, "a diffusers autoencoder")}
    for name, text in config.text_encoders.items():
        folders[f"text_encoders.{name}"] = (text.path, "a transformers text encoder")
    if config.vision_encoder is not None:
        folders["vision_encoder"] = (config.vision_encoder.path, "a vision transformer")
    weights = {}
    for name, (path, what) in folders.items():
        try:
            read_model_config(Path(path), what)
            weights[name] = weights_sha256(Path(path))
        except InputError as error:
            raise InputError(f"{name}.path: {error}") from None
    decisive = config.model_dump(mode="json", exclude=INDECISIVE)
    return {"config": decisive, "weights": weights}


def check_buckets(config: PrepareConfig, downscale: int) -> None:
    """Raises InputError where a bucket's sides are not whole latents."""
    if config.images.bucket_multiple % downscale:
        raise InputError(
            f"images.bucket_multiple: got {config.images.bucket_multiple}, expected a multiple of "
            f"{downscale}, the downscale of {config.vae.path}, times the patch size of the model."
        )
    vision = config.vision_encoder
    if vision is not None and config.images.bucket_multiple % vision.patch_pixels:
        raise InputError(
            f"vision_encoder.patch_pixels: got {vision.patch_pixels}, expected a divisor of "
            f"images.bucket_multiple, {config.images.bucket_multiple}"
        )


def encoder_settings(config: PrepareConfig, dataset: Path) -> EncoderSettings:
    """What the actors are made with. The manifest keeps the paths as given, which hold on other machines."""
    return EncoderSettings(
        output=str(dataset),
        vae=_located(config.vae),
        text_encoders={name: _located(text) for name, text in config.text_encoders.items()},
        vision_encoder=config.vision_encoder and _located(config.vision_encoder),
        images=config.images,
        encode=config.encode,
        has_labels=any(source.labels for source in config.sources.values()),
    )


def _located(section: Section) -> Section:
    """The section with an absolute path: an actor's working folder is its own."""
    return section.model_copy(update={"path": absolute(section.path)})
