"""The config of a training run. It imports neither torch nor pyarrow."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, cast

import yaml
from pydantic import Discriminator, Field, Tag

from models.config import Config, InputError, Place, parse_config
from models.networks import MODELS, DiTConfig, NetworkConfig, config_class
from pipeline.data.config import DataConfig, choose_partitions
from pipeline.objectives.config import ObjectiveConfig, SamplerConfig
from pipeline.training.config import (
    CheckpointConfig,
    EMAConfig,
    EngineConfig,
    MonitorConfig,
    OptimizerConfig,
    RejectionConfig,
)

if TYPE_CHECKING:
    from data_prep.schema import Manifest

CONFIG = "config.yaml"
"""The config of a run, in its folder."""


def _kind(model: Any) -> str:
    if isinstance(model, dict):
        return cast(dict[str, Any], model).get("kind", "dit")
    return getattr(model, "kind", "")


if TYPE_CHECKING:
    ModelConfig = NetworkConfig
else:
    ModelConfig = Annotated[
        Union[tuple(Annotated[config_class(kind), Tag(kind)] for kind in MODELS)],  # noqa: UP007
        Discriminator(_kind, custom_error_type="kind", custom_error_message="no such kind"),
    ]


class TrainingConfig(Config):
    images: int = Field(gt=0)
    """How long to train, in pictures, which mean the same at any batch size."""
    global_batch: int = Field(default=256, gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions dropped for classifier-free guidance (2207.12598)."""

    @property
    def num_steps(self) -> int:
        return -(-self.images // self.global_batch)


class StartConfig(Config):
    """Another run, with whose weights this one begins; `model.init_from` is for other programs."""

    run: Place
    weights: str = "ema"
    """raw, ema, or another average."""
    step: int | None = None
    """Step of its checkpoint; null: the newest."""
    convert: bool = False
    """Carry weights of another objective over (`objective.network`); else they are refused."""


MOVABLE = re.compile(
    r"data\.((datasets\..+\.)?path|verify|check|prefetch|cache.*|exclude|scores|filters.*)"
)
"""Keys of `data` that say where and how it is read, or what is left out: a run's eras record what that was."""


class EncodersConfig(Config):
    """Folders of the dataset's encoders that are not where `flowmill prepare` recorded them."""

    vae: Place | None = None
    text: dict[str, Place] = {}


class ResultsConfig(Config):
    """What changes results: a resumed run may change it only with --override."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    weights_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """The seed of the first weights alone; null: as `seed`, which also orders the data and draws the noise."""
    data: DataConfig
    model: ModelConfig = DiTConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    start_from: StartConfig | None = None
    rejection: RejectionConfig = RejectionConfig()


RESULTS = tuple(ResultsConfig.model_fields)


class TrainConfig(ResultsConfig):
    """One run: first what changes results, then what should not (speed), then what cannot."""

    engine: EngineConfig = EngineConfig()

    run: Place
    encoders: EncodersConfig = EncodersConfig()
    sampler: SamplerConfig = SamplerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    def check_samplers(self, *samplers: SamplerConfig, guide: bool = False) -> None:
        """Raise InputError where the network cannot be sampled from so, led by itself or by a guide."""
        if reasons := dict.fromkeys(r for s in samplers for r in self._refusals_of(s, guide)):
            raise InputError("\n".join(reasons))
        if guide and all(sampler.guidance_scale == 1 for sampler in samplers):
            raise InputError(
                "--guide: has no effect at sampler.guidance_scale 1. Remedy: another scale"
            )

    def refusals(self) -> Iterator[str]:
        batch, steps = self.training.global_batch, self.training.num_steps
        optimizer = self.optimizer
        for name in ("warmup_images", "decay_images"):
            if 0 < (images := getattr(optimizer, name)) < batch:
                yield f"optimizer.{name}: got {images}, less than a batch, which has no effect; expected 0, or {batch} or more"
        decay = {"constant_with_warmup": 0, "warmup_stable_decay": optimizer.decay_images // batch}
        needed = optimizer.warmup_images // batch + decay.get(optimizer.schedule, 1)
        if needed > steps:
            yield (
                f"optimizer.schedule: warm-up and decay got {needed} steps of {batch} pictures, and training.images "
                f"{self.training.images} are {steps}. Remedy: less of optimizer.warmup_images or decay_images, or more of training.images"
            )
        if batch % (size := self.engine.micro_batch or 1):
            yield f"engine.micro_batch: got {size}, expected a divisor of the global batch of {batch}"
        if self.start_from and self.model.init_from:
            yield "start_from and model.init_from: got both, and a run begins with one. Remedy: remove one"
        partitions = self.data.canonical_partitions
        for check in (self.model.check_shape, lambda: choose_partitions(partitions, batch, 1)):
            try:
                check()
            except InputError as error:
                yield str(error)
        yield from self._refusals_of(self.sampler)

    def _refusals_of(self, sampler: SamplerConfig, guide: bool = False) -> Iterator[str]:
        """The reasons why a network that is trained so cannot be sampled from so."""
        if sampler.shift is not None and not (path := self.objective.path).shiftable:
            yield f"sampler.shift has no meaning on path {path.kind}: its noise levels are fixed. Remedy: remove it"
        untrained = not (self.training.caption_dropout or self.start_from or self.model.init_from)
        if sampler.guidance_scale != 1 and untrained and not guide:
            yield (
                f"sampler.guidance_scale: got {sampler.guidance_scale:g}, but with training.caption_dropout 0 the "
                "network never learns what it is to do without a caption. Remedy: guidance_scale=1, or some dropout"
            )

    def notes(self) -> list[str]:
        """What comes later than the run's end, and what to know of the objective; the run is right all the same."""
        steps, batch = self.training.num_steps, self.training.global_batch
        spikes = self.rejection.spike_factor is not None
        alignment = getattr(self.model, "alignment", None)
        later = {
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "checkpoint.keep_every_steps": self.checkpoint.keep_every_steps,
            "monitor.every_steps": self.monitor.every_steps,
            "monitor.sample_every_steps": self.monitor.sample_every_steps,
            "monitor.profile_steps": self.monitor.profile_steps and self.monitor.profile_steps[1],
            "rejection.window": self.rejection.window if spikes else None,
            "ema.snapshot_images": self.ema.snapshot_images // batch,
            "model.alignment.until_images": alignment and (alignment.until_images or 0) // batch,
        }
        notes = [
            f"{name} is {value:,} steps, and the run has {steps:,}: it never comes"
            for name, value in later.items()
            if value and value > steps
        ]
        return [*self.objective.notes(), *notes]


def sizes_of(manifest: "Manifest") -> dict[str, Any]:
    """Sizes of the model that the data fix, for `with_sizes`."""
    return {
        "latent_channels": manifest.codec.channels,
        "latent_downscale": manifest.codec.downscale,
        "text_dim": manifest.text.width,
        "pooled_dim": manifest.text.pooled_width,
        "vision_dim": manifest.vision.dim if manifest.vision else 0,
    }


def dump_config(config: Config) -> str:
    """YAML from which `load_config` reads the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def load_run_config(run: Path, places: Sequence[str] = ()) -> TrainConfig:
    """The resolved config of a run; raises InputError where `run` is not the folder of one.

    `places` are overrides, section.key=value, for what lies elsewhere now.
    """
    path = run / CONFIG
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, expected the folder of a training run, which is `run` in its config"
        )
    data = yaml.safe_load(path.read_text())
    for place in places:
        keys, _, value = place.partition("=")
        *sections, last = keys.split(".")
        section = data
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return parse_config(TrainConfig, data, str(path))
