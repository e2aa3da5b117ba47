"""What a config means for the encoders: their weights, the buckets that fit them, what an actor is made with."""

from pathlib import Path
from typing import Any

from data_prep.config import INDECISIVE, PrepareConfig
from data_prep.encode import EncoderSettings
from data_prep.encoders import check_encoders, configured
from models.config import InputError


def check_settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the result, the encoders' weights included; raises InputError where one is not there."""
    decisive = config.model_dump(mode="json", exclude=INDECISIVE)
    hashes = check_encoders(config)
    # The order of the encoders is that of the members.
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


def encoder_settings(config: PrepareConfig, dataset: Path) -> EncoderSettings:
    """What the actors are made with. The manifest keeps the paths as given, which hold on other machines."""
    return EncoderSettings(
        output=str(dataset),
        encoders=configured(config),
        folder=Path.cwd(),
        images=config.images,
        encode=config.encode,
        thumbnails=config.thumbnails_per_shard,
        has_labels=any(source.labels for source in config.sources.values()),
    )
