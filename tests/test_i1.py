"""mmdit with all of i1's parts is i1 (2606.11289): the same output as its own torch model, key by key."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.conditions import Conditions
from models.networks import MMDiTConfig, build_model
from tests.golden_i1 import GOLDEN, LENGTHS, PUBLISHED, TINY, draw_weights

PARTS = {"modulation": "none", "sandwich_norm": True, "swiglu": True, "long_skips": True}
PARTS |= {"text_adapter": 2, "text_rope": True, "qk_norm": True, "pooled_dim": 0}
# Positions and turns, which we compute; t, which its forward drops; the null caption, for which the data has its own.
NOT_HERE = (
    r"pos_embed|rope_embedder\..*|t_embedder\..*|text_encoder_adapter\.learnable_null_caption"
)
# What the text becomes in the last block goes nowhere, so ours has no weights for it.
LAST_TEXT = r"\.(attn\.proj_text|mlp_text\.w12|mlp_text\.w3)\.(weight|bias)"
ENDS = {
    "x_embedder.proj": "proj_in",
    "text_encoder_adapter.connector_in": "context_embedder",
    "final_layer.norm_final": "norm",
    "final_layer.linear": "proj_out",
}
IN_BLOCK = {
    "norm1": ["norm"],
    "norm2": ["norm_ff"],
    "norm3": ["after_attention"],
    "norm4": ["after_ff"],
    "attn.q_norm": ["attn.norm_q", "attn.norm_added_q"],
    "attn.k_norm": ["attn.norm_k", "attn.norm_added_k"],
    "attn.qkv_image": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "attn.qkv_text": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "attn.proj_image": ["attn.to_out.0"],
    "attn.proj_text": ["attn.to_add_out"],
    "mlp_image.w12": ["ff.net.0.proj"],
    "mlp_image.w3": ["ff.net.2"],
    "mlp_text.w12": ["ff_context.net.0.proj"],
    "mlp_text.w3": ["ff_context.net.2"],
    "skip_linear_image": ["skip_linear.0"],
    "skip_linear_text": ["skip_linear.1"],
}
IN_ADAPTER = {
    "attn.q_norm": ["attn.norm_q"],
    "attn.k_norm": ["attn.norm_k"],
    "attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "attn.proj": ["attn.to_out.0"],
    "mlp.w12": ["ff.net.0.proj"],
    "mlp.w3": ["ff.net.2"],
}


def places(name: str, depth: int) -> tuple[str, list[str]]:
    """Where a weight of i1 lies here: the prefix, and names after it."""
    half = depth // 2
    if found := re.match(r"(in_blocks|mid_block|out_blocks)\.(?:(\d+)\.)?(.*)", name):
        first = {"in_blocks": 0, "mid_block": half, "out_blocks": half + 1}[found[1]]
        return f"transformer_blocks.{first + int(found[2] or 0)}.", IN_BLOCK[found[3]]
    if found := re.match(r"text_encoder_adapter\.connector_norm(\d)", name):
        number = int(found[1]) - 1
        return f"text_blocks.{number // 2}.", [f"norm{number % 2 + 1}"]
    if found := re.match(r"text_encoder_adapter\.connector_(attn|mlp)(\d?)\.(.*)", name):
        return f"text_blocks.{int(found[2] or 1) - 1}.", IN_ADAPTER[f"{found[1]}.{found[3]}"]
    return "", [ENDS[name]]


def split_pairs(value: Tensor, heads: int) -> Tensor:
    """i1 turns channels 2 i and 2 i + 1 of a head together, we i and i + d / 2."""
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def ours(theirs: dict[str, Tensor], heads: int, depth: int) -> dict[str, Tensor]:
    """i1's weights under our names; KeyError for one that no rule covers."""
    found: dict[str, Tensor] = {}
    for key, value in theirs.items():
        if re.fullmatch(NOT_HERE, key):
            continue
        name, _, kind = key.rpartition(".")
        prefix, names = places(name, depth)
        parts = value.chunk(3) if "qkv" in name else [value] * len(names)
        for own, part in zip(names, parts, strict=True):
            if "w12" in name:  # diffusers has the gate behind
                part = torch.cat(part.chunk(2)[::-1])
            if "text_encoder_adapter" not in name and re.search(
                r"attn\.(norm_|to_|add_)\w*[qk]\b|add_[qk]_", own
            ):
                part = split_pairs(part, 1 if "norm" in own else heads)
            if own == "proj_in" and kind == "weight":
                part = part.permute(0, 2, 3, 1).flatten(1)
            found[f"{prefix}{own}.{kind.replace('scale', 'weight')}"] = part
    last = f"transformer_blocks.{depth - 1}."
    gone = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
    return {
        name: part
        for name, part in found.items()
        if not name.startswith(tuple(last + g for g in gone))
    }


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict]:
    with safe_open(GOLDEN, "pt") as file:
        return load_file(GOLDEN), json.loads(file.metadata()["keys"])


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize("text", ["whole", "cut"])
def test_the_output_is_that_of_i1s_own_model(golden, resolution, text):
    """Texts of several lengths are to us one masked batch; i1 was run on each by itself, for its adapter sees padding."""
    given, keys = golden
    shape = {
        "hidden_size": TINY["hidden_size"],
        "depth": TINY["depth"],
        "num_heads": TINY["num_heads"],
    }
    positions = {"position_grid": 4, "position_extent": 4 * 256 / resolution}
    model = build_model(
        MMDiTConfig(size="debug", latent_channels=4, text_dim=12, **shape, **PARTS, **positions)
    )
    model.load_state_dict(ours(draw_weights(keys["tiny"]), TINY["num_heads"], TINY["depth"]))
    lengths = torch.tensor(LENGTHS if text == "cut" else [6] * 3)
    conditions = Conditions(given["text"], torch.arange(6) < lengths[:, None])
    with torch.no_grad():
        out = model.eval()(given["x_t"], torch.rand(3), conditions)
    expected = given[f"{text}_{resolution}"]
    assert expected.std() > 0.1
    print(
        "largest difference", float((out - expected).abs().max()), "of", float(expected.abs().max())
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "millions"), [("1B", 1020.4), ("3B", 3119.9)])
def test_every_weight_of_the_published_networks_has_its_place(golden, name, millions):
    assert name in PUBLISHED
    theirs = golden[1][name]
    width = theirs["x_embedder.proj.bias"][0]
    shape = {"hidden_size": width, "depth": 29, "num_heads": width // 72}
    with torch.device("meta"):
        weights = {key: torch.empty(size) for key, size in theirs.items()}
        config = MMDiTConfig(
            latent_channels=32,
            text_dim=2304,
            position_grid=16,
            position_extent=16,
            **shape,
            **PARTS,
        )
        own = {key: value.shape for key, value in build_model(config).state_dict().items()}
    assert {key: value.shape for key, value in ours(weights, width // 72, 29).items()} == own
    assert sum(size.numel() for size in own.values()) / 1e6 == pytest.approx(millions, abs=0.1)
