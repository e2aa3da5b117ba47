"""Weights to and from diffusers' classes and the original DiT's layout.

A parameter has our name in every layout, but for the rules below. An option that a class cannot compute is refused,
never dropped.
"""

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.config import InputError
from models.layers import PROJECTOR, positions_2d
from models.networks import DiTConfig, MMDiTConfig, NetworkConfig, TransformerConfig, UNetConfig
from models.weights import brief, load_network, read_model_config

DIT, PIXART, SD3 = "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"
FACEBOOK, OWN = "facebookresearch/DiT", "flowmill"


class Layout(NamedTuple):
    """How weights are named outside, and which options of ours the network there has no place for, or needs."""

    lacks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    rules: dict[str, str] = {}
    """Our name's pattern to theirs; the first that matches counts. `*` is any block, `@i` the i-th third of a tensor."""
    unused: str = "^$"
    """Pattern of weights there whose results go nowhere, and which are none here."""


LAYOUTS = {
    DIT: Layout(
        lacks=("text_dim", "pooled_dim", "qk_norm"),
        needs=("num_classes", "timestep_shift"),
        rules={
            r"^proj_in": "pos_embed.proj",
            r"^time_text_embed\.class_embedder": (
                "transformer_blocks.*.norm1.emb.class_embedder.embedding_table"
            ),
            r"^time_text_embed": "transformer_blocks.*.norm1.emb",
            r"^modulation_out\.linear": "proj_out_1",
            r"^proj_out": "proj_out_2",
        },
    ),
    PIXART: Layout(
        lacks=("pooled_dim", "num_classes", "timestep_shift", "qk_norm"),
        needs=("text_dim", "position_extent"),
        rules={r"^proj_in": "pos_embed.proj", r"^time_text_embed": "adaln_single.emb"},
    ),
    SD3: Layout(
        lacks=("num_classes",),
        needs=("pooled_dim",),
        rules={r"^proj_in": "pos_embed.proj", r"^position_table": "pos_embed.pos_embed"},
        # Text queries, which only the last block lacks here.
        unused=r"\.attn\.(add_q_proj|norm_added_q)\.",
    ),
    "UNet2DConditionModel": Layout(rules={r"^unet\.": ""}),
    OWN: Layout(),
    FACEBOOK: Layout(
        lacks=("text_dim", "pooled_dim", "timestep_shift", "position_extent", "qk_norm"),
        needs=("num_classes",),
        rules={
            r"^proj_in": "x_embedder.proj",
            r"^time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
            r"^time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
            r"^time_text_embed\.class_embedder": "y_embedder.embedding_table",
            r"^transformer_(.*)norm1\.linear": r"\1adaLN_modulation.1",
            r"^transformer_(.*)attn1\.to_q": r"\1attn.qkv@0",
            r"^transformer_(.*)attn1\.to_k": r"\1attn.qkv@1",
            r"^transformer_(.*)attn1\.to_v": r"\1attn.qkv@2",
            r"^transformer_(.*)attn1\.to_out\.0": r"\1attn.proj",
            r"^transformer_(.*)ff\.net\.0\.proj": r"\1mlp.fc1",
            r"^transformer_(.*)ff\.net\.2": r"\1mlp.fc2",
            r"^modulation_out\.linear": "final_layer.adaLN_modulation.1",
            r"^proj_out": "final_layer.linear",
        },
    ),
}
# Options that only our own format has a place for.
OWN_ALONE = ("size_conditioning", "rope", "register_tokens", "patch_bottleneck", "sandwich_norm")
OWN_ALONE += ("swiglu", "long_skips", "text_adapter", "text_rope")
# Arguments of diffusers' classes that decide nothing here, or that `check_config` compares by hand.
IGNORED = ("sample_size", "interpolation_scale", "norm_eps", "out_channels", "num_embeds_ada_norm")


def layout_of(config: NetworkConfig) -> str:
    """The diffusers class that computes what this network does; raises InputError naming what none can."""
    if isinstance(config, UNetConfig):
        return "UNet2DConditionModel"
    if isinstance(config, DiTConfig):
        layout = PIXART if config.modulation == "shared" else DIT
    elif isinstance(config, MMDiTConfig):
        layout = SD3
    else:
        raise InputError(f"model.kind: got {config.kind}, which diffusers has no class for")
    check_layout(config, layout)
    return layout


def check_layout(config: NetworkConfig, layout: str) -> None:
    """Raises InputError naming each option that the layout has no place for, or needs."""
    values, (lacks, needs, *_) = dict(config), LAYOUTS[layout]
    strange = {name: values[name] for name in (*OWN_ALONE, *lacks) if values.get(name)}
    if values.get("modulation") == "none":
        strange["modulation"] = "none"
    lines = [f"model.{k}: got {v}, which {layout} has no place for" for k, v in strange.items()]
    lines += [
        f"model.{name}: got {values.get(name)}, but {layout} needs it"
        for name in needs
        if not values.get(name)
    ]
    if values.get("mlp_ratio") not in (None, 4):
        lines.append(f"model.mlp_ratio: got {values['mlp_ratio']}, but {layout}'s is 4")
    if lines:
        raise InputError("\n".join(lines))


def diffusers_config(config: NetworkConfig, sample_size: int | None = None) -> dict[str, Any]:
    """Arguments of the diffusers class; `sample_size`, a latent's side, becomes the default of its pipeline."""
    layout = layout_of(config)
    if isinstance(config, UNetConfig):
        return config.diffusers() | {"sample_size": sample_size}
    assert isinstance(config, TransformerConfig)
    dim, depth, heads = config.shape()
    arguments: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "num_layers": depth,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "patch_size": config.patch_size,
    }
    if isinstance(config, MMDiTConfig):
        return arguments | {
            "sample_size": round(config.position_extent * config.patch_size),
            "pos_embed_max_size": config.position_grid,
            "joint_attention_dim": config.text_dim,
            "caption_projection_dim": dim,
            "pooled_projection_dim": config.pooled_dim,
            "dual_attention_layers": tuple(range(config.dual_attention_layers)),
            "qk_norm": "rms_norm" if config.qk_norm else None,
        }
    assert isinstance(config, DiTConfig)
    side = sample_size // config.patch_size if sample_size else round(config.position_extent or 16)
    arguments |= {"sample_size": side * config.patch_size, "norm_eps": 1e-6}
    if layout == DIT:
        if config.position_extent not in (None, side):
            raise InputError(
                f"sample_size: got {sample_size}, but model.position_extent={config.position_extent} "
                f"is that of {config.position_extent * config.patch_size:g}"
            )
        return arguments | {"num_embeds_ada_norm": config.num_classes}
    return arguments | {
        "cross_attention_dim": dim,
        "caption_channels": config.text_dim,
        "interpolation_scale": side / (config.position_extent or side),
        "use_additional_conditions": False,
    }


def places(name: str, layout: str, depth: int) -> list[tuple[str, int | None]]:
    """Where our parameter lies in the layout: keys, each with the third of that tensor, or None for all of it."""
    matching = (rule for rule in LAYOUTS[layout].rules.items() if re.search(rule[0], name))
    key = re.sub(*rule, name) if (rule := next(matching, None)) else name
    key, _, rest = key.partition("@")
    third = int(rest[0]) if rest else None
    key += rest[1:]
    return [(key.replace("*", str(i)), third) for i in range(depth if "*" in key else 1)]


def to_theirs(name: str, tensor: Tensor, key: str, channels: int) -> Tensor:
    """The tensor as the layout has it, where embedding patches is a convolution; here it is a linear."""
    if name == "proj_in.weight":
        side = round((tensor.shape[1] / channels) ** 0.5)
        return tensor.view(-1, side, side, channels).permute(0, 3, 1, 2)
    return tensor[None] if key == "pos_embed.pos_embed" else tensor


def to_ours(name: str, tensor: Tensor, own: Tensor, channels: int) -> Tensor:
    """Inverse of `to_theirs`; an output with learned variances (2102.09672) keeps the prediction alone."""
    if name == "proj_in.weight":
        tensor = tensor.permute(0, 2, 3, 1).flatten(1)
    elif name == "position_table":
        tensor = tensor.flatten(0, 1)
    elif name.startswith("proj_out.") and len(tensor) == 2 * len(own):
        tensor = tensor.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
    return tensor


def export_weights(model: Any, layout: str, sample_size: int = 32) -> dict[str, Tensor]:
    """The model's weights under the layout's names, with the positions there that we compute."""
    config, weights = model.config, model.state_dict()
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        for key, _ in places(name, layout, len(model.blocks)):
            parts.setdefault(key, []).append(to_theirs(name, tensor, key, config.latent_channels))
    dtype = next(iter(weights.values())).dtype
    table = fixed_positions(config, layout, sample_size)
    theirs = {key: value.to(dtype) for key, value in table.items()}
    theirs |= {key: torch.cat(part) for key, part in parts.items()}
    return {key: tensor.contiguous() for key, tensor in theirs.items()}


def fixed_positions(config: Any, layout: str, sample_size: int) -> dict[str, Tensor]:
    """The layout's tensor of positions that are not trained, where it has one."""
    cpu = torch.device("cpu")
    if layout == FACEBOOK:
        side = sample_size // config.patch_size
        return {"pos_embed": positions_2d(side, side, config.shape()[0], cpu)[None]}
    if layout != SD3:
        return {}
    grid, extent = config.position_grid, config.position_extent
    table = positions_2d(grid, grid, config.shape()[0], cpu, extent, grid)
    return {"pos_embed.pos_embed": table[None]}


def to_diffusers(model: Any, sample_size: int | None = None) -> Any:
    """The diffusers network, ready to save, with this model's weights, which the two share."""
    layout = layout_of(model.config)
    network = getattr(diffusers, layout)(**diffusers_config(model.config, sample_size))
    weights, own = export_weights(model, layout), network.state_dict()
    for key in filter(re.compile(LAYOUTS[layout].unused).search, own):
        weights.setdefault(key, torch.zeros_like(own[key], dtype=next(model.parameters()).dtype))
    network.load_state_dict(weights, assign=True)
    return network.eval()


def load_weights(model: Any, path: str | Path) -> None:
    """Load all weights from a diffusers folder, or a file in our names or the original DiT's; raises InputError."""
    path, config = Path(path), model.config
    if path.is_dir():
        name = read_model_config(path, "a diffusers network").get("_class_name")
        layout = layout_of(config)
        # The name of both classes of DiTConfig until 2024.
        legacy = isinstance(config, DiTConfig) and name == "Transformer2DModel"
        if name != layout and not legacy:
            raise InputError(f"{path}: _class_name got {name!r}, expected {layout} for this model")
        network = load_network("diffusers", layout, path)
        check_config(config, network.config, path)
        import_weights(model, network.state_dict(), layout, path)
        return
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read weights: {brief(error)}") from error
    layout = FACEBOOK if "blocks.0.attn.qkv.weight" in weights else OWN
    if layout == FACEBOOK:
        check_layout(config, layout)
    import_weights(model, weights, layout, path)


def check_config(config: Any, theirs: Any, path: Path) -> None:
    """Raises InputError with each argument in which the checkpoint's network differs from the config's."""
    layout = layout_of(config)
    with torch.device("meta"):
        ours = getattr(diffusers, layout)(**diffusers_config(config)).config
    names = [name for name in ours if not name.startswith("_") and name not in IGNORED]
    lines = [
        f"{path}: {name} got {theirs[name]}, the model section's is {ours[name]}"
        for name in names
        if json.dumps(theirs[name] or None) != json.dumps(ours[name] or None)
    ]
    if wanted := getattr(config, "position_extent", None):
        extent = theirs["sample_size"] // config.patch_size
        if layout == PIXART:
            extent /= theirs["interpolation_scale"] or max(theirs["sample_size"] // 64, 1)
        if extent != wanted:
            lines.append(f"{path}: its positions need model.position_extent={extent}")
    if lines:
        raise InputError("\n".join(lines))


def import_weights(model: Any, weights: dict[str, Tensor], layout: str, path: Path) -> None:
    """Copy every weight into the model; raises InputError for any that is missing, left over or does not fit."""
    config, own, known = model.config, model.state_dict(), set()
    for name, tensor in own.items():
        if name.startswith(PROJECTOR):
            continue
        keys = places(name, layout, len(model.blocks))
        known |= {key for key, _ in keys}
        if lacks := [key for key, _ in keys if key not in weights]:
            raise InputError(f"{path}: lacks {lacks[0]}, which the model section needs")
        whole = [
            weights[key].chunk(3)[part] if part is not None else weights[key] for key, part in keys
        ]
        if any(not torch.equal(whole[0], other) for other in whole[1:]):
            raise InputError(f"{path}: {keys[0][0]} differs from block to block; here it is one")
        value = whole[0]
        if layout != OWN:
            value = to_ours(name, value, tensor, config.latent_channels)
        if value.shape != tensor.shape:
            raise InputError(
                f"{path}: {keys[0][0]} got shape {tuple(whole[0].shape)}, the model section's {name} "
                f"has {tuple(tensor.shape)}"
            )
        own[name] = value
    side = round(weights["pos_embed"].shape[1] ** 0.5) if "pos_embed" in weights else 1
    table = fixed_positions(config, layout, side * getattr(config, "patch_size", 1))
    for key in weights.keys() - known:
        if key not in table and not re.search(LAYOUTS[layout].unused, key):
            raise InputError(
                f"{path}: {key} has no place in this model. Remedy: another model section"
            )
        if key in table and not torch.allclose(weights[key].float(), table[key], atol=1e-3):
            raise InputError(
                f"{path}: {key} is not the fixed table. Remedy: model.learned_positions=true"
            )
    model.load_state_dict(own)
