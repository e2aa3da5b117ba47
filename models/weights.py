"""Weights in a local folder: the checks shared by every frozen model, and the hash that names them.

Torch-free, so that a dataset's record can be compared with a folder before anything is loaded.
"""

import hashlib
import importlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from models.codec_layouts import LAYOUTS, PIXELS
from models.config import InputError
from models.files import file_sha256
from models.text_conventions import View

Dtype = Literal["fp32", "bf16", "fp16"]
EncoderDtype = Literal[Dtype, "tf32"]
"""How an encoder computes: tf32 is fp32 whose products and convolutions round their inputs, on a GPU."""
TORCH_DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# The files of weights in the order in which diffusers and transformers look for them.
WEIGHTS = (
    ("diffusion_pytorch_model", ".index.json"),
    ("diffusion_pytorch_model", ""),
    ("model", ""),
    ("model", ".index.json"),
)
# What config.json says of its own saving.
SAVED = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)
# What else decides which tokens a text becomes.
TOKENIZER_EXTRAS = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*")
# The class that holds the text encoder alone, by model_type in config.json.
TEXT_ENCODERS = {
    "bert": "BertModel",
    "distilbert": "DistilBertModel",
    "mpnet": "MPNetModel",
    "clip": "CLIPTextModelWithProjection",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "t5gemma": "T5GemmaEncoder",
    "gemma2": "Gemma2Model",
    "gemma3": "Gemma3Model",
    "gemma3_text": "Gemma3TextModel",
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "mistral3": "Mistral3Model",
    "phi3": "Phi3Model",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3": "Qwen3Model",
    "qwen3_vl": "Qwen3VLModel",
    "qwen3_vl_text": "Qwen3VLTextModel",
}
# In its module alone, which the package does not name itself.
HIDDEN_CLASS = "T5GemmaEncoder"
# The vector that a class gives by itself; of any other it is the mean over the tokens.
OWN_POOLED = {"CLIPTextModelWithProjection": "projected", "CLIPTextModel": "eos"}
# By model_type; all give the class token, any registers, then the patches, normalised.
VISION_ENCODERS = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
}


def weights_sha256(folder: Path) -> str:
    """sha256 over the files of weights that are loaded, in name order; raises InputError if there are none."""
    return file_sha256(*weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """Those of a folder's *.safetensors files that are loaded, in name order; raises InputError if there are none.

    Others may lie beside them: a variant in fp16, or the same weights in another program's format.
    """
    for name in (f"{stem}.safetensors{end}" for stem, end in WEIGHTS):
        if not (path := folder / name).is_file():
            continue
        if not name.endswith(".json"):
            return [path]
        try:
            files = sorted(
                {folder / part for part in json.loads(path.read_text())["weight_map"].values()}
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not an index of weights ({error!r})") from error
        if lost := [file for file in files if not file.is_file()]:
            raise InputError(
                f"{lost[0]}: no such file, though {name} names it. Remedy: download it."
            )
        return files
    others = sorted(p.name for kind in ("safetensors", "bin") for p in folder.glob(f"*.{kind}"))
    raise InputError(
        f"{folder}: got {', '.join(others[:3]) or 'no weights'}, expected model.safetensors or "
        "diffusion_pytorch_model.safetensors, or one of them in parts with its .index.json. Remedy: "
        "save_pretrained(..., safe_serialization=True) where the model came from, or download these files."
    )


def num_parameters(folder: Path) -> int:
    """How many numbers the weights that are loaded hold; raises InputError where a file is damaged."""
    count = 0
    for path in weight_files(folder):
        try:
            with safe_open(path, "numpy") as file:
                names = list(file.keys())
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except SafetensorError as error:
            raise InputError(f"{path}: damaged: {brief(error)}") from error
    return count


def config_sha256(config: dict[str, Any]) -> str:
    """sha256 of what a model's config.json says of the model, as against who saved it and from where."""
    text = json.dumps({k: v for k, v in config.items() if k not in SAVED}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_folder(path: Path) -> Path:
    """The text encoder's folder, or the sibling named after it, as in a diffusers pipeline; raises InputError.

    `tokenizer` belongs to `text_encoder`, `tokenizer_2` to `text_encoder_2` and so on.
    """
    sibling = path.parent / path.name.replace("text_encoder", "tokenizer")
    for folder in (path, sibling, path.parent / path.name.replace("text_encoder", "processor")):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    raise InputError(
        f"{path}: got no tokenizer (one of {', '.join(TOKENIZER_FILES)}), neither there nor in "
        f"{sibling}. Remedy: copy the model's tokenizer files into one of them."
    )


def tokenizer_sha256(path: Path) -> str:
    """sha256 over names and contents of the files that decide a text encoder's tokens, in name order."""
    digest, patterns = hashlib.sha256(), (*TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    folder = tokenizer_folder(path)
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def read_model_config(
    folder: Path, what: str, key: str = "", kinds: Collection[str] = ()
) -> dict[str, Any]:
    """config.json of a model folder that also has weights; raises InputError naming what is missing.

    With `kinds`, of one of which its value of `key` must be.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder, expected {what} saved by save_pretrained(). "
            "Remedy: download it and give its folder; nothing is fetched by name. How: data_prep/README.md, What you need."
        )
    path = folder / "config.json"
    if not path.is_file():
        found = [p.parent.name for p in sorted(folder.glob("*/config.json"))]
        hint = f" Did you mean its sub-folder {' or '.join(found)}?" if found else ""
        raise InputError(f"{path}: no such file, expected the config of {what}.{hint}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: got {type(config).__name__}, expected a JSON object")
    weight_files(folder)
    if kinds and (kind := config.get(key)) not in kinds:
        raise InputError(f"{folder}: {key} got {kind!r}, expected one of {', '.join(kinds)}")
    return config


def read_codec_config(folder: Path, dtype: EncoderDtype) -> dict[str, Any]:
    """config.json of a latent codec's folder; raises InputError if it is none, or none for this dtype."""
    kinds = [name for name in LAYOUTS if name != PIXELS]
    config = read_model_config(folder, "a diffusers autoencoder", "_class_name", kinds)
    if dtype == "fp16" and config.get("force_upcast"):
        raise InputError(
            f"{folder}: its config.json says that fp16 overflows (force_upcast). Remedy: dtype bf16 or fp32."
        )
    if missing := [key for key in LAYOUTS[config["_class_name"]].needs if not config.get(key)]:
        raise InputError(f"{folder}: config.json lacks {', '.join(missing)}")
    return config


def read_text_config(folder: Path, view: View) -> dict[str, Any]:
    """config.json of a text encoder's folder; raises InputError if it is none, or cannot give the view."""
    what = "a transformers text encoder"
    config = read_model_config(folder, what, "model_type", TEXT_ENCODERS)
    text = config.get("text_config") or config.get("encoder") or config
    positions, most = text.get("max_position_embeddings"), view.max_length
    if positions is not None and most > positions:
        raise InputError(f"{folder}: max_length got {most}, expected at most {positions}")
    family = text_class(config)
    if view.family not in (None, family):
        raise InputError(
            f"{folder}: got {family}, expected {view.family}, which the convention needs"
        )
    own = OWN_POOLED.get(family, "mean")
    if view.pooled not in ("own", "mean", "none", own) or (
        view.pooled == "own" and not view.layers and own == "mean"
    ):
        raise InputError(f"{folder}: pooled got {view.pooled}, but {family} has {own} or none")
    layers = (text.get(key) for key in ("num_hidden_layers", "num_layers", "n_layers"))
    check_layers(folder, view, next((number for number in layers if number), None))
    return config


def text_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that holds the text encoder of a config.json alone."""
    if "CLIPTextModelWithProjection" in (config.get("architectures") or []):
        return "CLIPTextModelWithProjection"
    return TEXT_ENCODERS[config["model_type"]]


def check_layers(folder: Path, view: View, number: int | None) -> None:
    """Raise InputError where the view names layers that an encoder of so many has not."""
    for layer in view.layers:
        if layer == "last" or number is None or -number <= layer < number:
            continue
        remedy = (
            "last, or -1 with final_norm said" if layer == number else f"{-number} to {number - 1}"
        )
        raise InputError(f"{folder}: layers got {layer} of {number}, expected {remedy}")


def read_vision_config(folder: Path) -> dict[str, Any]:
    """config.json of a vision transformer's folder; raises InputError if it is none."""
    return read_model_config(folder, "a vision transformer", "model_type", VISION_ENCODERS)


def brief(error: Exception) -> str:
    """The beginning of a library's message, on one line."""
    return " ".join(str(error).split())[:240]


def stored_values(folder: Path, name: str) -> list[float]:
    """The fp32 values of one of a folder's weights, of whatever dtype; raises InputError where it has none such."""
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name).float().flatten().tolist()
    raise InputError(f"{folder}: its weights lack {name}")


def network_class(package: Any, name: str) -> Any:
    """A class of diffusers or transformers."""
    if name == HIDDEN_CLASS:
        package = importlib.import_module("transformers.models.t5gemma.modeling_t5gemma")
    return getattr(package, name)


def load_network(
    library: str,
    name: str,
    path: Path,
    dtype: EncoderDtype = "fp32",
    unused: tuple[str, ...] = ("pooler.",),
) -> Any:
    """A class of diffusers or transformers with the folder's weights, frozen; raises InputError where any is missing.

    `unused` weights, by the beginnings of their names, may be: encoders of text and of squares of a picture do not use
    the pooler of BERT, MPNet and ViT, and many lack it.
    """
    import torch

    package, torch_dtype = importlib.import_module(library), getattr(torch, TORCH_DTYPES[dtype])
    package.utils.logging.disable_progress_bar()
    # Its reports list every weight that is left over or does not fit; what matters of them is said below.
    verbosity = package.utils.logging.get_verbosity()
    package.utils.logging.set_verbosity_error()
    if library == "transformers":
        options: dict[str, Any] = {"dtype": torch_dtype, "trust_remote_code": False}
        options |= {"ignore_mismatched_sizes": True}
    else:
        options = {"torch_dtype": torch_dtype, "low_cpu_mem_usage": False}
    options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        network, info = network_class(package, name).from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot load {name}: {brief(error)}") from error
    finally:
        package.utils.logging.set_verbosity(verbosity)
    wrong = [f"{key} is missing" for key in info["missing_keys"] if not key.startswith(unused)]
    for key, got, expected in info["mismatched_keys"]:
        wrong.append(f"{key} got {tuple(got)}, expected {tuple(expected)}")
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(
            f"{path}: its weights are not those of its config.json: {min(wrong)}{more}. Remedy: files of one model"
        )
    return network.eval().requires_grad_(False)


def load_processor(name: str, path: Path, what: str = "") -> Any:
    """What feeds a network of transformers, by the name of its class; raises InputError."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        return getattr(importlib.import_module("transformers"), name).from_pretrained(path, **local)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"{path}: cannot load {what or f'its {name}'}: {brief(error)}") from error
