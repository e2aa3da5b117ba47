"""Frozen text encoders: captions to token embeddings, a mask and one pooled vector."""

from pathlib import Path
from typing import Any

import torch
import transformers

from models.config import InputError
from models.numerics import tf32
from models.prompts import EncodedText, encode_text
from models.weights import (
    TEXT_ENCODERS,
    EncoderDtype,
    brief,
    load_network,
    read_text_config,
    tokenizer_folder,
    tokenizer_sha256,
    weights_sha256,
)


class TextEncoder:
    """A transformers text encoder in a local folder, frozen. L <= max_length, D = `dim`, P = `pooled_dim`."""

    def __init__(
        self, network: Any, tokenizer: Any, path: Path, max_length: int, dtype: EncoderDtype
    ):
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.path, self.max_length, self.dtype = path, max_length, dtype
        self.dim: int = network.config.hidden_size
        own = {"CLIPTextModelWithProjection": "projected", "CLIPTextModel": "eos"}
        self.pooled = own.get(type(network).__name__, "mean")
        projected = self.pooled == "projected"
        self.pooled_dim: int = network.config.projection_dim if projected else self.dim

    @classmethod
    def load(
        cls,
        path: str | Path,
        max_length: int,
        dtype: EncoderDtype = "fp32",
        device: str | torch.device = "cpu",
    ) -> "TextEncoder":
        """Open a folder with config.json, safetensors and a tokenizer; raises InputError if one is missing."""
        path = Path(path)
        config = read_text_config(path, max_length)
        name = TEXT_ENCODERS[config["model_type"]]
        if "CLIPTextModelWithProjection" in (config.get("architectures") or []):
            name = "CLIPTextModelWithProjection"
        tokenizer = load_tokenizer(path)
        network = load_network("transformers", name, path, dtype).to(device)
        return cls(network, tokenizer, path, max_length, dtype)

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> EncodedText:
        """The captions as this encoder sees them."""
        with tf32(self.dtype == "tf32"):
            device = self.network.device
            return encode_text(self.network, self.tokenizer, captions, self.max_length, device)

    def record(self) -> dict[str, Any]:
        """The fields of the RoleRecord that a dataset made with this encoder has."""
        return {
            "family": type(self.network).__name__,
            "path": str(self.path),
            "weights_sha256": weights_sha256(self.path),
            "tokenizer_sha256": tokenizer_sha256(self.path),
            "dtype": self.dtype,
            "view": {"max_length": self.max_length, "pooled": self.pooled},
            "dim": self.dim,
            "pooled_dim": self.pooled_dim,
        }


def count_cut(tokenizer: Any, captions: list[str], max_length: int) -> int:
    """Captions that have more tokens than max_length, so that they are encoded without their end."""
    if not captions:
        return 0
    tokens = tokenizer(captions, verbose=False)["input_ids"]
    return sum(len(caption) > max_length for caption in tokens)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a text encoder's folder; raises InputError."""
    folder = tokenizer_folder(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"{folder}: cannot load tokenizer: {brief(error)}") from error
    if tokenizer.pad_token is None:
        raise InputError(f"{folder}: got a tokenizer without a pad token, expected one")
    return tokenizer
