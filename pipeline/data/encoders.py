"""The codec and text encoders of a dataset, each checked to be the one that prepared it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.schema import CodecRecord, Manifest
from models.config import InputError
from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from models.weights import weights_sha256


def encoder_folder(recorded: str, given: str | None, sha256: str, key: str) -> Path:
    """Where an encoder is here: `given` by the config, else as recorded; raises InputError if it is another one."""
    folder = Path(given or recorded)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder. Remedy: {key}=FOLDER with the encoder that prepared the data."
        )
    if (got := weights_sha256(folder)) != sha256:
        raise InputError(
            f"{key}: {folder} is not the encoder that prepared the data: weights got sha256 {got[:12]}, "
            f"expected {sha256[:12]} (prepared with {recorded}). Remedy: give that one's folder, or prepare again."
        )
    return folder


@dataclass(frozen=True)
class Encoders:
    """A dataset's codec and its text encoders in its order, each checked to be the one that prepared the data."""

    record: CodecRecord
    codec: LatentCodec
    codec_folder: Path
    text: list[TextEncoder]
    device: torch.device


def load_encoders(
    manifest: Manifest, vae: str | None, text: dict[str, str], device: torch.device
) -> Encoders:
    """Load them from `vae` and `text` (a folder by name) where given, else from where they were."""
    record, encoders = manifest.codec, []
    where = encoder_folder(record.path, vae, record.weights_sha256, "encoders.vae")
    codec = LatentCodec.load(where, record.dtype, device)  # pyright: ignore[reportArgumentType]
    for name, encoder in manifest.text.roles.items():
        folder = encoder_folder(
            encoder.path, text.get(name), encoder.weights_sha256, f"encoders.text.{name}"
        )
        encoders.append(TextEncoder.load(folder, encoder.view.max_length, encoder.dtype, device))  # pyright: ignore[reportArgumentType]
    return Encoders(record, codec, where, encoders, device)
