"""One preparation's config: every section from the module that it configures."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from data_prep.catalog import CaptionsConfig, FiltersConfig
from data_prep.encode import EncodeConfig
from data_prep.encoders import TextEncoderConfig, VaeConfig, VisionEncoderConfig
from data_prep.images import ImagesConfig
from data_prep.sources import SourceConfig
from data_prep.workers import RayConfig
from models.config import Config

SourceName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
EncoderName = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]*$"), AfterValidator(lambda name: _free_name(name))
]
INDECISIVE = {"publish_every_shards", "ray", "output"}  # of the config


def _free_name(name: str) -> str:
    if name in ("moments", "micro", "label", "vision", "json") or name.endswith("_pooled"):
        raise ValueError(f"{name} is the name of another member of a sample; choose another")
    return name


class PrepareConfig(Config):
    """A preparation. All but the last three decides what is written, bit by bit, when it is complete."""

    sources: dict[SourceName, SourceConfig] = Field(min_length=1)
    images: ImagesConfig = ImagesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    filters: FiltersConfig = FiltersConfig()
    vae: VaeConfig
    text_encoders: dict[EncoderName, TextEncoderConfig] = Field(default_factory=dict)
    vision_encoder: VisionEncoderConfig | None = None
    encode: EncodeConfig = EncodeConfig()
    samples_per_shard: int = Field(default=1000, ge=1)
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1)
    thumbnails_per_shard: int = Field(default=4, ge=1)
    """Pictures of a shard that its proof shows: chosen by their keys, decoded once from their latents."""
    # Shards made between a manifest of what is there so far and the next; null: one, at the end.
    publish_every_shards: int | None = Field(default=None, ge=1)
    ray: RayConfig = RayConfig()
    output: str  # a local path, or any fsspec URL such as s3://bucket/folder

    @model_validator(mode="after")
    def _labels_are_of_one_kind(self) -> Self:
        if len({source.labels for source in self.sources.values()}) > 1:
            found = ", ".join(f"{name}: {s.labels or 'none'}" for name, s in self.sources.items())
            raise ValueError(
                f"sources: got labels by {found}, expected all from classes' folders, all from a column "
                "of integers, or none"
            )
        return self
