"""A dataset's codec and text encoders, each checked to be the one that prepared it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep.encoders import Text
from data_prep.schema import CodecRecord, Manifest, RoleRecord, TextRecord
from models.codec_layouts import PIXELS
from models.config import InputError
from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from models.weights import weights_sha256


def open_codec(record: CodecRecord, given: str | None, device: torch.device) -> LatentCodec:
    """The codec of a dataset, in the folder `given` or as recorded; raises InputError if that holds another one."""
    folder = codec_folder(record, given)
    return LatentCodec.load(folder, record.dtype, device)  # pyright: ignore[reportArgumentType]


def codec_folder(record: CodecRecord, given: str | None) -> Path | None:
    """Where the codec lies, None of pixels; raises InputError if another one does."""
    return None if record.class_name == PIXELS else encoder_folder(record, given, "vae")


def encoder_folder(record: CodecRecord | RoleRecord, given: str | None, name: str) -> Path:
    """The encoder's folder, `given` or as recorded; raises InputError if it holds another one.

    `name` is its key in the config's section `encoders`.
    """
    folder = Path(given or record.path)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder. Remedy: encoders.{name}=FOLDER with the encoder that prepared the data."
        )
    if (got := weights_sha256(folder)) != record.weights_sha256:
        raise InputError(
            f"encoders.{name}: {folder} is not the encoder that prepared the data: weights got sha256 {got[:12]}, "
            f"expected {record.weights_sha256[:12]} (prepared with {record.path}). Remedy: give that one's folder, "
            "or prepare again."
        )
    return folder


@dataclass(frozen=True)
class Encoders:
    """A dataset's codec, and the text encoders that a network reads, by name."""

    record: CodecRecord
    codec: LatentCodec
    text: dict[str, TextEncoder]
    text_record: TextRecord
    device: torch.device


def load_encoders(
    manifest: Manifest, vae: str | None, text: dict[str, str], device: torch.device
) -> Encoders:
    """Load the encoders from `vae` and `text` (folders by name), else from the recorded folders."""
    codec, used = open_codec(manifest.codec, vae, device), manifest.text.used
    return Encoders(manifest.codec, codec, open_texts(used, text, device), manifest.text, device)


def open_texts(
    roles: dict[str, RoleRecord], text: dict[str, str], device: torch.device
) -> dict[str, TextEncoder]:
    """The text encoders of some roles, from `text` (folders by name), else from the recorded folders."""
    encoders = {}
    for name, role in roles.items():
        folder = encoder_folder(role, text.get(name), f"text.{name}")
        encoders[name] = TextEncoder.load(folder, role.view, role.dtype, device)  # pyright: ignore[reportArgumentType]
    return encoders


def encode_caption(
    roles: dict[str, RoleRecord], texts: dict[str, TextEncoder], caption: str
) -> dict[str, np.ndarray]:
    """What a dataset stores of a caption, by member."""
    found: dict[str, np.ndarray] = {}
    for name, encoder in texts.items():
        arrays = Text(encoder, name, roles[name].store).encode([caption])
        found |= {member: values[0] for member, values in arrays.items() if "." not in member}
    return found
