"""The config of a training run. It imports neither torch nor pyarrow."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, cast

import yaml
from pydantic import Discriminator, Field, Tag

from models.config import Config, InputError, parse_config
from models.networks import MODELS, DiTConfig, NetworkConfig, config_class
from pipeline.data.config import DataConfig
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

RESULTS = (
    "seed",
    "data",
    "model",
    "objective",
    "training",
    "optimizer",
    "ema",
    "start_from",
    "rejection",
)
"""Sections that change results: a resumed run may change them only with --override."""


def _kind(model: Any) -> str:
    return cast(dict[str, Any], model).get("kind", "dit") if isinstance(model, dict) else model.kind


if TYPE_CHECKING:
    ModelConfig = NetworkConfig
else:
    ModelConfig = Annotated[
        Union[tuple(Annotated[config_class(kind), Tag(kind)] for kind in MODELS)],  # noqa: UP007
        Discriminator(
            _kind,
            custom_error_type="kind",
            custom_error_message=f"kind: expected one of {', '.join(MODELS)}",
        ),
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

    run: str
    weights: str = "ema"
    """raw, ema, or another average."""
    step: int | None = None
    """Step of its checkpoint; null: the newest."""


class EncodersConfig(Config):
    """Folders of the dataset's encoders that are not where `flowmill prepare` recorded them."""

    vae: str | None = None
    text: dict[str, str] = {}


class TrainConfig(Config):
    """One run: first what changes results, then what should not (speed), then what cannot."""

    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: ModelConfig = DiTConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    start_from: StartConfig | None = None
    rejection: RejectionConfig = RejectionConfig()

    engine: EngineConfig = EngineConfig()

    run: str
    encoders: EncodersConfig = EncodersConfig()
    sampler: SamplerConfig = SamplerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()


def sizes_of(manifest: "Manifest") -> dict[str, Any]:
    """Sizes of the model that the data fix, for `with_sizes`."""
    records = manifest.text.roles.values()
    return {
        "latent_channels": manifest.codec.channels,
        "latent_downscale": manifest.codec.downscale,
        "text_dim": max((record.dim for record in records), default=0),
        "pooled_dim": sum(record.pooled_dim for record in records),
        "vision_dim": manifest.vision.dim if manifest.vision else 0,
    }


def dump_config(config: Config) -> str:
    """YAML from which `load_config` reads the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def load_run_config(run: Path) -> TrainConfig:
    """The resolved config of a run; raises InputError where `run` is not the folder of one."""
    path = run / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected the folder of a training run")
    return parse_config(TrainConfig, yaml.safe_load(path.read_text()), str(path))
