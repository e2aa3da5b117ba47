"""Configs of the commands that prepare a dataset and fit an autoencoder; neither torch nor Ray is needed."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from data_prep.catalog import CaptionsConfig, FiltersConfig
from data_prep.encoders import (
    CaptionerConfig,
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
    View,
    own_view,
)
from models.weights import Dtype

SourceName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
# Fields that do not decide what is written.
INDECISIVE = {"publish_every_shards": True, "ray": True, "output": True}
# Encoders are known by the hashes of what is loaded, a base by its id, wherever they lie; a table is read when a
# generation takes its captions from it.
PLACES = {"vae": {"path"}, "text_encoders": {"__all__": {"path"}}, "vision_encoder": {"path"}}
PLACES |= {"base": True, "captions": {"table": True, "captioner": {"path"}}}


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


class EncodingConfig(Config):
    """What encodes, how fast and where to: a preparation's and a layer's."""

    text: Annotated[str | Combination, AfterValidator(_known)] = "plain"
    """A convention: one of a pipeline of diffusers by its name, `plain`, or one's own. Of a base and its layers one."""
    text_encoders: Entries[EncoderName, TextEncoderConfig] = Field(default_factory=dict)
    """By name; under a named convention the names are its roles."""
    vision_encoder: VisionEncoderConfig | None = None
    thumbnails_per_shard: int = Field(default=4, ge=1)
    """Pictures of a shard that its proof speaks of and the report may show: chosen by their keys."""
    ray: RayConfig = RayConfig()
    output: str
    """A local path, or any fsspec URL such as s3://bucket/folder."""

    @model_validator(mode="after")
    def _views_are_as_the_convention_says(self) -> Self:
        for name, given in self.text_encoders.items():
            view = own_view(self.text, name, given)
            self.text_encoders[name] = given.model_copy(update=dict(view))
        return self

    @property
    def views(self) -> dict[str, View]:
        return {name: encoder.view for name, encoder in self.text_encoders.items()}


class PicturesConfig(Config):
    """Which pictures there are, and how they become latents."""

    sources: Entries[SourceName, SourceConfig] = Field(min_length=1)
    images: ImagesConfig = ImagesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    filters: FiltersConfig = FiltersConfig()
    vae: VaeConfig


class PrepareConfig(EncodingConfig, PicturesConfig):
    """A preparation. All but `ray`, `output` and `publish_every_shards` decides what is written, bit by bit."""

    encode: EncodeConfig = EncodeConfig()
    samples_per_shard: int = Field(default=1000, ge=1)
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1)
    publish_every_shards: int | None = Field(default=None, ge=1)
    """Shards between two manifests of what is there so far; null: one manifest, at the end."""

    @model_validator(mode="after")
    def _text_is_whole(self) -> Self:
        self.text_record({})
        return self

    def text_record(self, roles: dict[str, Any]) -> dict[str, Any]:
        """What the manifest says of the text; `roles`: what the encoders say of themselves."""
        return text_record(self.text, roles, self.views)

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
    """Captions from a table or a captioner in place of the base's; `per_picture` are drawn as for the base."""

    table: AbsolutePath | None = None
    """A file of Parquet, CSV or JSONL, or a folder of them. Several rows of a picture are several captions."""
    by: Literal["key", "name"] = "key"
    """How a row names its picture: column `key`, or columns `source` and `name`, as KEY.json has them."""
    caption: str = "caption"
    """Column of the caption, or of a list of equally good ones."""
    weight: str | None = None
    """Column of the caption's weight; null: all weigh the same."""
    captioner: CaptionerConfig | None = None

    @model_validator(mode="after")
    def _they_come_from_one_place(self) -> Self:
        given = [name for name in ("table", "captioner") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"got {' and '.join(given) or 'neither'}, expected one of table and captioner. Remedy: a layer for "
                "each; without captions a layer has its base's"
            )
        of_table = () if self.table else ("by", "caption", "weight")
        if lost := sorted(self.model_fields_set & {"per_picture", *of_table}):
            has = "a layer has as many samples as its base" if lost[-1] == "per_picture" else ""
            raise ValueError(f"{lost[-1]}: no effect, for {has or 'it names what a table has'}")
        return self


class LayerConfig(EncodingConfig):
    """A layer: more members for the pictures of a dataset, which stays as it is."""

    base: Place
    """The dataset's folder; `output` is not within it."""
    captions: LayerCaptions | None = None
    """Null: the base's."""
    encode: EncodeConfig | None = None
    """Null: the base's, so that the numbers are those of a preparation with all encoders at once."""

    @model_validator(mode="after")
    def _adds_something(self) -> Self:
        if self.captions and not self.text_encoders:
            raise ValueError("captions: no effect without text_encoders")
        if not (self.text_encoders or self.vision_encoder):
            raise ValueError(
                "a layer needs text_encoders or a vision_encoder: base alone adds none"
            )
        return self

    def text_record(self, roles: dict[str, Any]) -> dict[str, Any]:
        """What the layer's manifest says of its text, which is read with that of its base."""
        if self.text == "plain":
            return text_record(self.text, roles, self.views)
        name = self.text if isinstance(self.text, str) else "custom"
        read = CONVENTIONS[self.text] if isinstance(self.text, str) else self.text
        said = {"convention": name, "roles": roles}
        return said | {key: getattr(read, key) for key in Combination.model_fields}


def config_of(data: dict[str, Any], where: str) -> PrepareConfig | LayerConfig:
    """What a YAML file of flowmill prepare holds: a preparation, or with `base` a layer; raises InputError."""
    return parse_config(LayerConfig if "base" in data else PrepareConfig, data, where)


def check_settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the result, the encoders' weights included.

    Raises InputError where one is not there, or does not divide the buckets' sides as it needs.
    """
    settings, got = decisive(config), config.images.bucket_multiple
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
    return settings


def decisive(config: PrepareConfig | LayerConfig) -> dict[str, Any]:
    """The config without places, and the encoders by their hashes; raises InputError where one is not there."""
    hashes = check_encoders(config)
    # The order of the encoders is that of the members.
    said = {"encoders": list(hashes), "hashes": hashes}
    return {"config": config.model_dump(mode="json", exclude=INDECISIVE | PLACES)} | said


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
