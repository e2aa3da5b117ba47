"""Frozen text encoders: captions to token embeddings, a mask and one pooled vector."""

from pathlib import Path
from typing import Any

import torch
import transformers

from models import weights
from models.config import InputError
from models.numerics import tf32
from models.prompts import TextReader, dropped, final_norm, prefix_tokens, token_ids
from models.text_conventions import Chat, Store, View, width_stored


class TextEncoder(TextReader):
    """A transformers text encoder in a local folder, frozen, in one view.

    `dim` is the width of its rows, 0 without any, and `pooled_dim` that of its vector. The folder holds config.json,
    safetensors and a tokenizer; raises InputError if one of them does not suit the view.
    """

    def __init__(
        self,
        path: str | Path,
        view: View,
        dtype: weights.EncoderDtype = "fp32",
        device: str | torch.device = "cpu",
    ):
        self.path, self.dtype = Path(path), dtype
        family = weights.text_class(weights.read_text_config(self.path, view))
        tokenizer = load_tokenizer(self.path)
        check_tokenizer(tokenizer, view, self.path)
        network = weights.load_network("transformers", family, self.path, dtype).to(device)
        weights.check_layers(self.path, view, text_config(network.config).num_hidden_layers)
        if view.final_norm or -1 in view.layers:
            final_norm(network)
        super().__init__(network, tokenizer, with_own_pooled(view, family), network.device)
        self.dim, self.pooled_dim = widths(network.config, self.view)

    @torch.inference_mode()
    def forward(self, batch: Any) -> Any:
        with tf32(self.dtype == "tf32"):
            return super().forward(batch)

    def record(self) -> dict[str, Any]:
        """The fields of the RoleRecord that a dataset made with this encoder has."""
        return {
            "family": type(self.network).__name__,
            "path": str(self.path),
            "weights_sha256": weights.weights_sha256(self.path),
            "tokenizer_sha256": weights.tokenizer_sha256(self.path),
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
    own = weights.OWN_POOLED.get(family, "mean")
    return view.model_copy(update={"pooled": own}) if view.pooled == "own" else view


def widths(config: Any, view: View) -> tuple[int, int]:
    """Width of the rows and of the vector that a view has of an encoder; 0 where it has none."""
    text = text_config(config)
    hidden, dim = text.hidden_size, text.hidden_size * len(view.layers)
    pooled = {"none": 0, "mean": dim, "eos": hidden}
    return dim, text.projection_dim if view.pooled == "projected" else pooled[view.pooled]


def stored_bytes(path: Path, view: View, store: Store) -> tuple[int, int]:
    """Bytes of a stored row and of the vector of an encoder that is not opened."""
    family = weights.text_class(weights.read_text_config(path, view))
    known = weights.network_class(transformers, family).config_class
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
    folder = weights.tokenizer_folder(path)
    tokenizer = weights.load_processor("AutoTokenizer", folder, "tokenizer")
    if tokenizer.pad_token is None:
        raise InputError(f"{folder}: got a tokenizer without a pad token, expected one")
    return tokenizer
