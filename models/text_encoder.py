"""Frozen text encoders: captions to token embeddings, a mask and one pooled vector."""

from pathlib import Path
from typing import Any

import torch
import transformers

from models.config import InputError
from models.numerics import tf32
from models.prompts import (
    EncodedText,
    dropped,
    encode_empty,
    encode_prompts,
    encode_text,
    final_norm,
    prefix_tokens,
    token_ids,
)
from models.text_conventions import Chat, Store, View, width_stored
from models.weights import (
    OWN_POOLED,
    EncoderDtype,
    brief,
    check_layers,
    load_network,
    network_class,
    read_text_config,
    text_class,
    tokenizer_folder,
    tokenizer_sha256,
    weights_sha256,
)


class TextEncoder:
    """A transformers text encoder in a local folder, frozen, in one view.

    `dim` is the width of its rows, 0 without any, and `pooled_dim` that of its vector.
    """

    def __init__(self, network: Any, tokenizer: Any, path: Path, view: View, dtype: EncoderDtype):
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.path, self.dtype = path, dtype
        self.view = with_own_pooled(view, type(network).__name__)
        self.dim, self.pooled_dim = widths(network.config, self.view)

    @classmethod
    def load(
        cls,
        path: str | Path,
        view: View,
        dtype: EncoderDtype = "fp32",
        device: str | torch.device = "cpu",
    ) -> "TextEncoder":
        """Open a folder with config.json, safetensors and a tokenizer; raises InputError if one does not suit the view."""
        path = Path(path)
        name = text_class(read_text_config(path, view))
        tokenizer = load_tokenizer(path)
        check_tokenizer(tokenizer, view, path)
        network = load_network("transformers", name, path, dtype).to(device)
        text = text_config(network.config)
        check_layers(path, view, text.num_hidden_layers)
        if view.final_norm or -1 in view.layers:
            final_norm(network)
        return cls(network, tokenizer, path, view, dtype)

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> EncodedText:
        """The captions as this encoder sees them."""
        with tf32(self.dtype == "tf32"):
            device = self.network.device
            return encode_text(self.network, self.tokenizer, captions, self.view, device)

    @torch.inference_mode()
    def encode_empty(self, empty: str) -> EncodedText:
        """The caption without words, as a convention has it."""
        with tf32(self.dtype == "tf32"):
            device = self.network.device
            return encode_empty(self.network, self.tokenizer, self.view, empty, device)

    @torch.inference_mode()
    def encode_prompts(self, texts: list[str], role: Any, empty: str) -> EncodedText:
        """The texts and, last, the empty caption, as a network reads them of a dataset's role."""
        with tf32(self.dtype == "tf32"):
            pair = self.network, self.tokenizer
            return encode_prompts(pair, texts, role, empty, self.network.device)

    def record(self) -> dict[str, Any]:
        """The fields of the RoleRecord that a dataset made with this encoder has."""
        return {
            "family": type(self.network).__name__,
            "path": str(self.path),
            "weights_sha256": weights_sha256(self.path),
            "tokenizer_sha256": tokenizer_sha256(self.path),
            "dtype": self.dtype,
            "view": self.view,
            "dim": self.dim,
            "pooled_dim": self.pooled_dim,
        }


def text_config(config: Any) -> Any:
    """What a config says of the text encoder alone."""
    return getattr(config, "encoder", None) or config.get_text_config()


def with_own_pooled(view: View, family: str) -> View:
    """The view with the vector that the class of transformers has, where it says `own`."""
    own = OWN_POOLED.get(family, "mean")
    return view.model_copy(update={"pooled": own}) if view.pooled == "own" else view


def widths(config: Any, view: View) -> tuple[int, int]:
    """Width of the rows and of the vector that a view has of an encoder; 0 where it has none."""
    text = text_config(config)
    hidden, dim = text.hidden_size, text.hidden_size * len(view.layers)
    pooled = {"none": 0, "mean": dim, "eos": hidden}
    return dim, text.projection_dim if view.pooled == "projected" else pooled[view.pooled]


def stored_bytes(path: Path, view: View, store: Store) -> tuple[int, int]:
    """Bytes of a stored row and of the vector of an encoder that is not opened."""
    family = text_class(read_text_config(path, view))
    known = network_class(transformers, family).config_class
    config = known.from_pretrained(path, local_files_only=True)
    dim, pooled = widths(config, with_own_pooled(view, family))
    return width_stored(store, dim) * (1 if store == "int8" else 2), 2 * pooled


def count_tokens(tokenizer: Any, captions: list[str], view: View) -> list[int]:
    """The tokens of each caption, however long, without those of its template that are not kept."""
    if not captions:
        return []
    begin, end = dropped(tokenizer, view)
    tokens = token_ids(tokenizer, captions, view, verbose=False)["input_ids"]
    return [len(caption) - (end - begin) for caption in tokens]


def count_cut(tokenizer: Any, captions: list[str], view: View) -> int:
    """Captions that have more tokens than the view keeps, so that they are encoded without their end."""
    return sum(count > view.max_length for count in count_tokens(tokenizer, captions, view))


def check_tokenizer(tokenizer: Any, view: View, path: Path) -> None:
    """Raise InputError where the tokenizer cannot make the view's text, or its template has other tokens."""
    if isinstance(view.template, Chat) and not tokenizer.chat_template:
        raise InputError(f"{path}: got a tokenizer without a chat template, which this view needs")
    if view.clean == "deepfloyd":
        from diffusers.utils import is_ftfy_available

        if not is_ftfy_available():
            raise InputError("clean: deepfloyd needs the package ftfy. Remedy: pip install ftfy")
    wanted = view.drop if isinstance(view.drop, int) else 0
    if wanted and (got := prefix_tokens(tokenizer, view)) != wanted:
        raise InputError(
            f"{path}: its tokenizer makes {got} tokens of the template before the prompt, expected {wanted}. "
            "Remedy: the tokenizer of the model, or drop: counted"
        )


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
