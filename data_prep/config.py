"""Configs of the commands that prepare a dataset and fit an autoencoder; neither torch nor Ray is needed."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from data_prep.catalog import CaptionsConfig, FiltersConfig
from data_prep.encoders import (
    EncodeConfig,
    TextEncoderConfig,
    VaeConfig,
    VisionEncoderConfig,
    check_encoders,
    configured,
)
from data_prep.images import ImagesConfig, list_buckets
from data_prep.schema import text_record
from data_prep.sources import SourceConfig
from data_prep.storage import AbsolutePath
from models.config import Config, Entries, InputError, Place, parse_config
from models.text_conventions import (
    CONVENTIONS,
    REFUSED,
    Combination,
    own_view,
)
from models.weights import Dtype

SourceName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
# Fields that do not decide what is written.
INDECISIVE = {"publish_every_shards": True, "ray": True, "output": True}
# Encoders are known by the hashes of what is loaded, wherever they lie.
PLACES = {"vae": {"path"}, "text_encoders": {"__all__": {"path"}}, "vision_encoder": {"path"}}


def _free_name(name: str) -> str:
    if name in ("moments", "micro", "label", "vision", "json") or name.endswith("_pooled"):
        raise ValueError(f"{name} is the name of another member of a sample; choose another")
    return name


def _known(text: str | Combination) -> str | Combination:
    if isinstance(text, str) and text not in (names := ["plain", *CONVENTIONS]):
        reason = f"{text} has no convention: {REFUSED[text]}; " if text in REFUSED else ""
        raise ValueError(f"{reason}expected one of {', '.join(names)}, or tokens, pooled and empty")
    return text


EncoderName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$"), AfterValidator(_free_name)]


class RayConfig(Config):
    """How fast, never what. Null: what the machine or the cluster has."""

    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of the embedded Ray; a cluster knows its own."""
    num_actors: int | None = Field(default=None, ge=1)
    """Null: one per GPU; without GPUs one per `encode.threads` CPUs, so far as memory holds them."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """Null: 1 where there are GPUs."""
    decoders_per_actor: int | None = Field(default=None, ge=1)
    """Null: the CPUs that are left, shared out."""


class PrepareConfig(Config):
    """A preparation. All but the last three decides what is written, bit by bit, when it is complete."""

    sources: Entries[SourceName, SourceConfig] = Field(min_length=1)
    images: ImagesConfig = ImagesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    filters: FiltersConfig = FiltersConfig()
    vae: VaeConfig
    text: Annotated[str | Combination, AfterValidator(_known)] = "plain"
    """A convention: one of a pipeline of diffusers by its name, `plain`, or one's own."""
    text_encoders: Entries[EncoderName, TextEncoderConfig] = Field(default_factory=dict)
    """By name; under a named convention the names are its roles."""
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
    def _text_is_as_the_convention_says(self) -> Self:
        encoders = self.text_encoders
        for name, given in encoders.items():
            view = own_view(self.text, name, given)
            encoders[name] = given.model_copy(update=dict(view))
        self.text_record({})
        return self

    def text_record(self, roles: dict[str, Any]) -> dict[str, Any]:
        """What the manifest says of the text; `roles`: what the encoders say of themselves."""
        views = {name: encoder.view for name, encoder in self.text_encoders.items()}
        return text_record(self.text, roles, views)

    @model_validator(mode="after")
    def _labels_are_of_one_kind(self) -> Self:
        if len({source.labels for source in self.sources.values()}) > 1:
            found = ", ".join(f"{name}: {s.labels or 'none'}" for name, s in self.sources.items())
            raise ValueError(
                f"sources: got labels by {found}, expected all from classes' folders with the same option "
                "classes, all from a column of integers, or none"
            )
        return self


class LayerCaptions(CaptionsConfig):
    """Captions from a table in place of the base's; `per_picture` are drawn as for the base."""

    table: AbsolutePath
    """A file of Parquet, CSV or JSONL, or a folder of them. Several rows of a picture are several captions."""
    by: Literal["key", "name"] = "key"
    """How a row names its picture: column `key`, or columns `source` and `name`, as KEY.json has them."""
    caption: str = "caption"
    """Column of the caption, or of a list of equally good ones."""
    weight: str | None = None
    """Column of the caption's weight; null: all weigh the same."""

    @model_validator(mode="after")
    def _per_picture_is_the_bases(self) -> Self:
        if "per_picture" in self.model_fields_set:
            raise ValueError("per_picture: no effect, for a layer has as many samples as its base")
        return self


class LayerConfig(Config):
    """A layer: more members for the pictures of a dataset, which stays as it is."""

    base: Place
    """The dataset's folder."""
    captions: LayerCaptions | None = None
    """Null: the base's."""
    text: Annotated[str | Combination, AfterValidator(_known)] = "plain"
    """That of the base and all layers, whose encoders together are to be those of the convention."""
    text_encoders: Entries[EncoderName, TextEncoderConfig] = Field(default_factory=dict)
    vision_encoder: VisionEncoderConfig | None = None
    encode: EncodeConfig | None = None
    """Null: the base's, so that the numbers are those of a preparation with all encoders at once."""
    thumbnails_per_shard: int = Field(default=4, ge=1)
    """Captions of a shard that its proof speaks of."""
    ray: RayConfig = RayConfig()
    output: str
    """A local path, or any fsspec URL; not within the base."""

    @model_validator(mode="after")
    def _adds_something(self) -> Self:
        encoders = self.text_encoders
        if self.captions and not encoders:
            raise ValueError("captions: no effect without text_encoders")
        if not (encoders or self.vision_encoder):
            raise ValueError(
                "a layer needs text_encoders or a vision_encoder: base alone adds none"
            )
        for name, given in encoders.items():
            encoders[name] = given.model_copy(update=dict(own_view(self.text, name, given)))
        return self

    def text_record(self, roles: dict[str, Any]) -> dict[str, Any]:
        """What the layer's manifest says of its text, which is read with that of its base."""
        views = {name: encoder.view for name, encoder in self.text_encoders.items()}
        if self.text == "plain":
            return text_record(self.text, roles, views)
        read = CONVENTIONS[self.text] if isinstance(self.text, str) else self.text
        said = {"convention": self.text if isinstance(self.text, str) else "custom", "roles": roles}
        return said | {key: getattr(read, key) for key in Combination.model_fields}


def config_of(data: dict[str, Any], where: str) -> PrepareConfig | LayerConfig:
    """What a YAML file of flowmill prepare holds: a preparation, or with `base` a layer; raises InputError."""
    return parse_config(LayerConfig if "base" in data else PrepareConfig, data, where)


def check_settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the result, the encoders' weights included.

    Raises InputError where one is not there, or does not divide the buckets' sides as it needs.
    """
    hashes, got = check_encoders(config), config.images.bucket_multiple
    for place, encoder in configured(config).items():
        if got % encoder.divides:
            raise InputError(
                f"images.bucket_multiple: got {got}, expected a multiple of {encoder.divides}, for {place}. Remedy: "
                "the downscale of the vae times the patch size of the model suits every encoder."
            )
        only = encoder.only_side
        if only and list_buckets(config.images) != [(only, only)]:
            raise InputError(
                f"{place}: takes squares of {only} pixels alone. Remedy: images.resolution={only} and "
                "images.bucket_max_aspect=1"
            )
    # The order of the encoders is that of the members.
    decisive = config.model_dump(mode="json", exclude=INDECISIVE | PLACES)
    return {"config": decisive, "encoders": list(hashes), "hashes": hashes}


class LossConfig(Config):
    """Weights of the terms, on pixels in [-1, 1]. `edges` is the L1 of differences of neighbour pixels."""

    l1: float = Field(default=1.0, ge=0)
    mse: float = Field(default=1.0, ge=0)
    edges: float = Field(default=1.0, ge=0)
    kl: float = Field(default=1e-4, ge=0)
    """As in Rombach et al., 2112.10752: both sums over a picture."""


class FitVaeConfig(Config):
    """One run. The sides of latents are resolution / 2^(number of channels - 1)."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    output: Path
    resolution: int = Field(64, gt=0)
    max_pictures: int = Field(50_000, gt=0)
    """Pictures per source; in memory each takes 3 resolution^2 bytes, and while it is chosen the file of one
    that lies in a table as bytes."""
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    channels: list[int] = Field([32, 64, 64], min_length=2)
    latent_channels: int = Field(4, gt=0)
    layers_per_block: int = Field(1, gt=0)
    loss: LossConfig = LossConfig()
    batch_size: int = Field(16, gt=0)
    steps: int | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)
    lr: float = Field(1e-3, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    save_dtype: Dtype = "fp16"
    checkpoint_minutes: float = Field(2.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "FitVaeConfig":
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("expected either steps or minutes")
        if self.resolution % (downscale := 2 ** (len(self.channels) - 1)):
            raise ValueError(
                f"resolution got {self.resolution}, expected a multiple of {downscale}"
            )
        if any(width % 8 for width in self.channels):
            raise ValueError(f"channels got {self.channels}, expected multiples of 8")
        return self
