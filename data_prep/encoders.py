"""The frozen encoders of a preparation: how each kind is configured, opened, and what it adds to a sample.

Another kind is a config and an encoder here, a field of PrepareConfig, and its record in the manifest.
"""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from data_prep.schema import CodecRecord, Member, RoleRecord, VisionRecord
from models.codec_layouts import LAYOUTS, PIXELS, Layout
from models.config import Config, InputError, Place
from models.files import file_sha256
from models.text_conventions import Store, View, width_stored
from models.weights import (
    EncoderDtype,
    config_sha256,
    num_parameters,
    read_codec_config,
    read_model_config,
    read_text_config,
    read_vision_config,
    tokenizer_sha256,
    weights_sha256,
)

# torch is imported by `open`: configs are also read where nothing is encoded.

# Of torch and of what is encoded at a time.
PROCESS_BYTES = 1 << 30
# By member, an array for each picture or caption.
Arrays = dict[str, np.ndarray | list[np.ndarray]]


class Encoder:
    """What preparation asks of an encoder of any kind; `name` is the last part of its place in the config."""

    reads: ClassVar[Literal["pixels", "captions", "prompts"]] = "pixels"
    RECORD: ClassVar[type[Config]]

    def __init__(self, model: Any, name: str):
        self.model, self.name = model, name

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return self.RECORD.model_validate(self.model.record()).model_dump()

    def members(self) -> dict[str, Member]:
        raise NotImplementedError

    def encode(self, batch: Any) -> Arrays:
        """Every member's array of each picture, uint8 (B, 3, H, W), or of each caption."""
        raise NotImplementedError


class EncoderConfig(Config):
    """What every kind of encoder has."""

    path: Place
    """Folder of the network, as save_pretrained() writes it."""
    dtype: EncoderDtype = "fp32"

    def read_config(self) -> dict[str, Any]:
        """Its config.json; raises InputError where that is not of an encoder that can be opened so."""
        raise NotImplementedError

    @property
    def divides(self) -> int:
        """The sides of a picture must be multiples of it, in pixels."""
        return 1

    @property
    def only_side(self) -> int | None:
        """The one side of the square pictures that it takes; None: any."""
        return None

    def hashes(self) -> dict[str, str]:
        """sha256 of what decides its numbers; raises InputError where it is not there."""
        config = config_sha256(self.read_config())
        return {"weights": weights_sha256(Path(self.path)), "config": config}

    def memory(self) -> int:
        """Bytes that its weights take."""
        return num_parameters(Path(self.path)) * (2 if self.dtype in ("bf16", "fp16") else 4)

    def open(self, name: str, device: str) -> Encoder:
        """The encoder; raises InputError."""
        raise NotImplementedError


class VaeConfig(EncoderConfig):
    """The latent codec: a diffusers autoencoder's folder, or `path: pixels` for pictures as they are."""

    path: Literal["pixels"] | Place

    @model_validator(mode="after")
    def _pixels_have_no_dtype(self) -> Self:
        if self.path == PIXELS and self.dtype != "fp32":
            raise ValueError("dtype: no effect on pixels, which no network encodes")
        return self

    def read_config(self) -> dict[str, Any]:
        if self.path == PIXELS:
            return {"_class_name": PIXELS}
        return read_codec_config(Path(self.path), self.dtype)

    @property
    def layout(self) -> Layout:
        config = self.read_config()
        return LAYOUTS[config["_class_name"]](config)

    @property
    def divides(self) -> int:
        return self.layout.downscale

    @property
    def only_side(self) -> int | None:
        return self.layout.only_side

    def hashes(self) -> dict[str, str]:
        return {} if self.path == PIXELS else super().hashes()

    def memory(self) -> int:
        return 0 if self.path == PIXELS else super().memory()

    def doubt(self) -> str:
        """What is to be said of its config.json; "" where that says by what latents are scaled."""
        config = self.read_config()
        if config.get("scaling_factor") or not self.layout.scaled:
            return ""
        return (
            f"vae.path: {self.path}/config.json has no scaling_factor, so that latents are scaled by "
            f"the default of {config.get('_class_name')}. Remedy: write the factor of this vae there."
        )

    def open(self, name: str, device: str) -> "Codec":
        from models.vae import LatentCodec

        path = None if self.path == PIXELS else self.path
        return Codec(LatentCodec(path, self.dtype, device), name)


class TextEncoderConfig(EncoderConfig, View):
    """A transformers text encoder's folder, its tokenizer within or beside it, and what is stored of it.

    A named convention decides the view: of a role of its own `path`, `dtype` and `store` alone are given.
    """

    store: Store = "float16"
    """bfloat16 holds numbers beyond 65504, with 8 bits of each in place of 11; int8 takes half the space, with 8 bits of
    each token's largest number."""

    @property
    def view(self) -> View:
        return View(**{name: getattr(self, name) for name in View.model_fields})

    def read_config(self) -> dict[str, Any]:
        return read_text_config(Path(self.path), self)

    def hashes(self) -> dict[str, str]:
        return super().hashes() | {"tokenizer": tokenizer_sha256(Path(self.path))}

    def open(self, name: str, device: str) -> "Text":
        from models.text_encoder import TextEncoder

        encoder = TextEncoder(self.path, self.view, self.dtype, device)
        return Text(encoder, name, self.store)


class VisionEncoderConfig(EncoderConfig):
    """A transformers vision transformer's folder, such as DINOv2's: features for `model.alignment` (REPA).

    They are large: 256 vectors of 768 are 384 KiB per picture, where its latents are 16.
    """

    patch_pixels: int = Field(default=16, ge=1)
    """The network's patch times the codec's downscale."""

    def read_config(self) -> dict[str, Any]:
        return read_vision_config(Path(self.path))

    @property
    def divides(self) -> int:
        return self.patch_pixels

    def hashes(self) -> dict[str, str]:
        scale = [p for p in (Path(self.path) / "preprocessor_config.json",) if p.is_file()]
        return super().hashes() | {"preprocessor": file_sha256(*scale)}

    def open(self, name: str, device: str) -> "Vision":
        from models.vision_encoder import VisionEncoder

        return Vision(VisionEncoder(self.path, self.patch_pixels, self.dtype, device), name)


class CaptionerConfig(EncoderConfig):
    """A transformers image-text-to-text model's folder, its processor within, and what it is asked."""

    prompts: list[str] = Field(min_length=1)
    """One for each caption of a picture, beginning where its key says; one that is there twice is asked twice as often."""
    max_new_tokens: int = Field(default=256, ge=1)
    """An answer that has not ended by then is no caption."""
    temperature: float = Field(default=0.0, ge=0)
    """0: the likeliest tokens. Else they are drawn by numbers that depend on the key and the prompt."""
    batch_size: int = Field(default=8, ge=1)
    pixels: int = Field(default=448, ge=1)
    """Shorter side, at least, of what it is shown: the training crop at a multiple of the bucket's size."""

    def read_config(self) -> dict[str, Any]:
        return read_model_config(Path(self.path), "a transformers image-text-to-text model")

    def hashes(self) -> dict[str, str]:
        found, names = super().hashes(), ("*processor_config.json", "generation_config.json")
        files = sorted(path for name in names for path in Path(self.path).glob(name))
        tokenizer = tokenizer_sha256(Path(self.path))
        return found | {"tokenizer": tokenizer, "processor": file_sha256(*files)}

    def open(self, name: str, device: str) -> "Writer":
        from models.captioner import Captioner

        return Writer(Captioner(Path(self.path), self.dtype, device), name, self)


class EncodeConfig(Config):
    """What changes the last bits of the numbers, so that it must not change while a dataset is made."""

    batch_size: int = Field(default=16, ge=1)
    threads: int = Field(default=1, ge=1)
    """Threads of torch per actor; on CPUs more actors beat more threads."""


class Codec(Encoder):
    """The latent codec, whose moments are stored raw."""

    RECORD = CodecRecord

    def members(self) -> dict[str, Member]:
        depth = self.model.channels * (1 if self.model.deterministic else 2)
        dtype = self.model.layout.stored
        return {"moments": Member(dtype=dtype, shape=(depth, None, None))}

    def encode(self, batch: Any) -> Arrays:
        moments = self.model.encode_moments(batch).cpu().numpy()
        # What is over float16's limit becomes infinite, and its picture a reject.
        with np.errstate(over="ignore"):
            return {"moments": moments.astype(self.model.layout.stored)}


class Text(Encoder):
    """One role of the text: rows of tokens, and one vector, so far as its view has them."""

    reads = "captions"
    RECORD = RoleRecord

    def __init__(self, model: Any, name: str, store: Store):
        super().__init__(model, name)
        self.store: Store = store
        # What vectors and the empty caption are stored in.
        self.whole = "float16" if store == "int8" else store

    def record(self) -> dict[str, Any]:
        return super().record() | {"store": self.store}

    def members(self) -> dict[str, Member]:
        dim, width = self.model.dim, self.model.pooled_dim
        stored = Member(dtype=self.store, shape=(None, width_stored(self.store, dim)))
        vector = Member(dtype=self.whole, shape=(width,))
        return ({self.name: stored} if dim else {}) | (
            {f"{self.name}_pooled": vector} if width else {}
        )

    def encode(self, batch: Any) -> Arrays:
        """Every member's array of each caption; of int8 the error of each token too, 1 - cosine, as NAME.error."""
        tokens, mask, pooled = self.model.encode(batch)
        found = self._arrays(tokens, mask, pooled)
        if self.store == "int8" and self.model.dim:
            import torch

            from models.prompts import dequantised, quantised

            stored, exact = quantised(tokens), tokens.double()
            same = torch.cosine_similarity(exact, dequantised(stored).double(), dim=-1)
            found[self.name] = _real(stored, mask)
            found[f"{self.name}.error"] = _real((1 - same) * exact.any(-1), mask)
        return found

    def encode_empty(self, empty: str) -> dict[str, np.ndarray]:
        """Every member's array of the caption without words, none in int8."""
        found = self._arrays(*self.model.encode_empty(empty))
        return {name: values[0] for name, values in found.items()}

    def _arrays(self, tokens: Any, mask: Any, pooled: Any) -> Arrays:
        found: Arrays = {}
        if self.model.dim:
            found[self.name] = _real(self._stored(tokens), mask)
        if pooled is not None:
            found[f"{self.name}_pooled"] = self._stored(pooled).cpu().numpy()
        return found

    def _stored(self, values: Any) -> Any:
        """The numbers as they are stored, but for int8; raises InputError where that cannot hold them."""
        import torch

        dtype, peak = getattr(torch, self.whole), values.abs().max().item()
        # Other captions may give larger ones.
        if not peak <= (largest := torch.finfo(dtype).max / 2):
            remedy = f"text_encoders.{self.name}." + (
                "store=bfloat16" if math.isfinite(peak) else "dtype=bf16, or fp32"
            )
            raise InputError(
                f"text_encoders.{self.name}: got numbers up to {peak:.4g}, expected at most {largest:.4g}, half of what "
                f"{self.whole} holds. Remedy: {remedy}, and --restart"
            )
        values = values.to(dtype)
        return values.view(torch.uint16) if self.whole == "bfloat16" else values


def _real(values: Any, mask: Any) -> list[np.ndarray]:
    """The rows of every caption's own tokens."""
    pairs = zip(values.cpu().numpy(), mask.cpu().numpy(), strict=True)
    return [rows[kept] for rows, kept in pairs]


class Vision(Encoder):
    """Features of a vision transformer, to align a network's with."""

    RECORD = VisionRecord

    def members(self) -> dict[str, Member]:
        return {"vision": Member(dtype="float16", shape=(self.model.dim, None, None))}

    def encode(self, batch: Any) -> Arrays:
        return {"vision": self.model.encode(batch).half().cpu().numpy()}


class Writer(Encoder):
    """A captioner: samples hold what text encoders make of its words."""

    reads = "prompts"

    def __init__(self, model: Any, name: str, config: CaptionerConfig):
        super().__init__(model, name)
        self.config = config

    def members(self) -> dict[str, Member]:
        return {}

    def answer(self, prompt: str, batch: list[tuple[str, np.ndarray]]) -> dict[str, list[Any]]:
        """The `answers` to a prompt about pictures, uint8 (H, W, 3) each, with their keys."""
        import torch

        keys, pixels = zip(*batch, strict=True)
        pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # (B, 3, H, W)
        limits = self.config.max_new_tokens, self.config.temperature
        return {"answers": self.model.answer(pictures, keys, prompt, *limits)}


def configured(config: Config) -> dict[str, EncoderConfig]:
    """Every encoder of a preparation's config by its place there, in the order of their members."""
    found: dict[str, EncoderConfig] = {}
    for name, value in config:
        inner = dict(value) if isinstance(value, dict | Config) else {}
        places = {name: value} | {f"{name}.{key}": each for key, each in inner.items()}
        found |= {place: e for place, e in places.items() if isinstance(e, EncoderConfig)}
    return found


def weight_of(config: Config) -> int:
    """Bytes of memory that a process with every encoder of a preparation takes, roughly."""
    weights = sum(encoder.memory() for encoder in configured(config).values())
    return PROCESS_BYTES + weights * 5 // 4


def check_encoders(config: Config) -> dict[str, dict[str, str]]:
    """The hashes of every encoder by its place in the config; raises InputError naming all that are not there."""
    found, lacking = dict[str, dict[str, str]](), list[str]()
    for place, encoder in configured(config).items():
        try:
            found[place] = encoder.hashes()
        except InputError as error:
            lacking.append(f"{place}.path: {error}")
    if lacking:
        raise InputError("\n".join(lacking))
    return found
