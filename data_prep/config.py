"""One preparation's config: every section from the module that it configures."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from data_prep.catalog import CaptionsConfig, FiltersConfig
from data_prep.encoders import (
    EncodeConfig,
    TextEncoderConfig,
    VaeConfig,
    VisionEncoderConfig,
    check_encoders,
)
from data_prep.images import ImagesConfig
from data_prep.sources import SourceConfig
from data_prep.workers import RayConfig
from models.config import Config, InputError

SourceName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
EncoderName = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]*$"), AfterValidator(lambda name: _free_name(name))
]
# Fields that do not decide what is written.
INDECISIVE = {"publish_every_shards", "ray", "output"}


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
    publish_every_shards: int | None = Field(default=None, ge=1)
    """Shards between two manifests of what is there so far; null: one manifest, at the end."""
    ray: RayConfig = RayConfig()
    output: str
    """A local path, or any fsspec URL such as s3://bucket/folder."""

    @model_validator(mode="after")
    def _labels_are_of_one_kind(self) -> Self:
        if len({source.labels for source in self.sources.values()}) > 1:
            found = ", ".join(f"{name}: {s.labels or 'none'}" for name, s in self.sources.items())
            raise ValueError(
                f"sources: got labels by {found}, expected all from classes' folders, all from a column "
                "of integers, or none"
            )
        return self


def check_settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the result, the encoders' weights included; raises InputError where one is not there."""
    hashes = check_encoders(config)
    # The order of the encoders is that of the members.
    decisive = config.model_dump(mode="json", exclude=INDECISIVE)
    return {"config": decisive, "encoders": list(hashes), "hashes": hashes}


def check_buckets(config: PrepareConfig, divides: dict[str, int]) -> None:
    """Raise InputError where a bucket's sides are not multiples of what each encoder, by place, needs."""
    got = config.images.bucket_multiple
    for place, side in divides.items():
        if got % side:
            raise InputError(
                f"images.bucket_multiple: got {got}, expected a multiple of {side}, for {place}. Remedy: "
                "the downscale of the vae times the patch size of the model suits every encoder."
            )
