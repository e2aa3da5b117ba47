"""What every architecture promises: shapes, conditioning, initialisation, masks, options that act."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from models import layers
from models.conditions import Conditions
from models.config import InputError
from models.exchange import layout_of
from models.networks import (
    MODELS,
    DiTConfig,
    MMDiTConfig,
    TransformerConfig,
    UNetConfig,
    UViTConfig,
    build_model,
    config_class,
)
from models.roles import parameter_roles
from tests.benchmarks import sizes
from tests.train_factory import run

ROOT = Path(__file__).parent.parent
CONFIGS: dict[str, Any] = {kind: config_class(kind) for kind in MODELS}
TRANSFORMERS = [kind for kind, c in CONFIGS.items() if issubclass(c, TransformerConfig)]
DATA = {"latent_channels": 4, "text_dim": 12, "pooled_dim": 6}
ALL = {"size_conditioning": True, "num_classes": 3}
# Each with an option that changes its parts.
VARIANTS = [
    *((kind, {}) for kind in CONFIGS),
    ("dit", {"modulation": "shared"}),
    ("mmdit", {"qk_norm": True, "dual_attention_layers": 1, "learned_positions": True}),
]
I1 = {
    "depth": 3,
    "modulation": "none",
    "pooled_dim": 0,
    "sandwich_norm": True,
    "swiglu": True,
    "long_skips": True,
    "text_adapter": 2,
    "qk_norm": True,
}
# The recipe i1 as a whole, and each of its parts alone.
RECIPES = [
    ("mmdit", {**I1, "text_rope": True}),
    ("dit", I1),
    *(
        (k, {part: I1[part], "depth": 3})
        for k in ("dit", "mmdit")
        for part in I1
        if part[0] in "slt"
    ),
    *((k, {"modulation": "none", "pooled_dim": 0}) for k in ("dit", "mmdit")),
    ("mmdit", {"text_rope": True, "dual_attention_layers": 1}),
]


def debug(kind: str, **options: Any) -> nn.Module:
    if kind == "unet" and options.get("size_conditioning"):
        options = {"latent_downscale": 8, **options}
    return build_model(CONFIGS[kind](size="debug", **{**DATA, **options}))


def randomise(model: nn.Module) -> nn.Module:
    """Weights that hide nothing behind a zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(height: int = 8, width: int = 8, batch: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(batch, 4, height, width, generator=g),
        "t": torch.rand(batch, generator=g),
        "text_emb": torch.randn(batch, 5, 12, generator=g),
        "text_mask": torch.arange(5) < torch.tensor([[2], [5], [3]])[:batch],
        "pooled": torch.randn(batch, 6, generator=g),
        "micro": torch.tensor([[256.0, 256.0, 0.0, 0.0]]).expand(batch, 4),
        "label": torch.arange(batch),
    }


def predict(model: Any, x_t: torch.Tensor, t: torch.Tensor, **conditions: Any) -> Any:
    return model(x_t, t, Conditions(**conditions))


@pytest.mark.parametrize(("kind", "options"), VARIANTS + RECIPES)
def test_an_untrained_network_returns_exactly_zero(kind, options):
    more = {} if "modulation" in options else ALL
    assert predict(debug(kind, **options, **more), **inputs()).abs().max() == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *VARIANTS,
        *RECIPES,
        *((kind, {"qk_norm": True, "register_tokens": 3}) for kind in TRANSFORMERS),
        *((kind, {"rope": True, "register_tokens": 2}) for kind in TRANSFORMERS),
        *((kind, {"patch_size": 4}) for kind in TRANSFORMERS),
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (8, 16), (12, 4)])
def test_the_prediction_has_the_shape_of_the_latents(kind, options, size):
    out = predict(randomise(debug(kind, **options)), **inputs(*size))
    assert out.shape == (3, 4, *size)
    assert out.isfinite().all()


def test_a_unet_takes_sides_that_halve_unevenly():
    assert predict(randomise(debug("unet")), **inputs(7, 9)).shape == (3, 4, 7, 9)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_latent_that_the_patch_does_not_divide_is_an_error(kind):
    with pytest.raises(ValueError, match=r"7x8.*patch_size 2"):
        predict(debug(kind), **inputs(7, 8))


@pytest.mark.parametrize("name", ["t", "text_emb", "text_mask", "pooled", "micro", "label", "x_t"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_condition_that_the_config_has_reaches_the_output(kind, name):
    model = randomise(debug(kind, **ALL))
    given = inputs()
    before = predict(model, **given)
    changed = {
        "text_mask": torch.arange(5) < torch.tensor([[4], [3], [5]]),
        "label": given["label"].roll(1),
        "micro": given["micro"] + torch.tensor([0.0, 64.0, 0.0, 0.0]),
    }
    given[name] = changed.get(name, given[name].roll(1, -1))
    assert (predict(model, **given) - before).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
def test_conditions_of_another_shape_or_number_of_pictures_fail_where_shapes_are_checked(kind):
    model = debug(kind, **ALL)
    for name in ("text_emb", "text_mask", "pooled", "micro", "label"):
        with pytest.raises(TypeCheckError):
            predict(model, **inputs() | {name: inputs()[name][:2]})
    with pytest.raises(TypeCheckError):
        predict(model, **inputs() | {"text_mask": torch.ones(3, 4, dtype=torch.bool)})


NETWORKS = [*((kind, {}) for kind in CONFIGS), *RECIPES]


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_tokens_behind_the_mask_and_further_padding_change_nothing(kind, options):
    model = randomise(debug(kind, **options))
    given = inputs()
    before = predict(model, **given)
    given["text_emb"] = given["text_emb"].masked_fill(~given["text_mask"][..., None], 7.0)
    given["text_emb"] = nn.functional.pad(given["text_emb"], (0, 0, 0, 4), value=7.0)
    given["text_mask"] = nn.functional.pad(given["text_mask"], (0, 4))
    # Masked weights are e^-inf; another order of summing.
    torch.testing.assert_close(predict(model, **given), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_without_a_mask_all_tokens_count(kind, options):
    model = randomise(debug(kind, **options))
    given = inputs()
    whole = given | {"text_mask": torch.ones(3, 5, dtype=torch.bool)}
    expected = predict(model, **given | {"text_mask": None})
    torch.testing.assert_close(predict(model, **whole), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["pooled", "text_emb", "label", "micro"])
def test_a_condition_that_the_network_needs_cannot_be_left_out(kind, name):
    with pytest.raises(ValueError, match=name):
        predict(debug(kind, **ALL), **inputs() | {name: None})


@pytest.mark.parametrize("kind", CONFIGS)
def test_time_in_lower_precision_is_refused_and_fp32_time_survives_a_bf16_network(kind):
    model = randomise(debug(kind).bfloat16())
    given = inputs() | {"t": torch.tensor([0.5000, 0.5005, 0.5010])}
    with pytest.raises(TypeError, match="float32"):
        predict(model, **given | {"t": given["t"].bfloat16()})
    # In bf16 the three times are one; their sinusoids in fp32 are far apart.
    assert given["t"].bfloat16().unique().numel() == 1
    given = {k: v[:1].expand(3, *v.shape[1:]) if k != "t" else v for k, v in given.items()}
    out = predict(model, **given)
    assert out.dtype == torch.bfloat16
    assert (out[0] - out[2]).abs().max() > 0


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(kind, options):
    gradients, kept = [], []
    for checkpointing in (False, True):
        options = options | {"gradient_checkpointing": checkpointing}
        model = randomise(debug(kind, **options)).train()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: (saved.append(x.numel()), x)[1], lambda x: x
        ):
            loss = predict(model, **inputs()).square().mean()
        kept.append(sum(saved))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.5 * kept[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_every_parameter_has_a_gradient(kind, options):
    options = options | ({"register_tokens": 2} if kind in TRANSFORMERS else {})
    model = randomise(debug(kind, **options, **({} if "modulation" in options else ALL)))
    predict(model, **inputs()).square().mean().backward()
    lacking = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert lacking == []


# In a process of its own: the checks of shapes that pytest wraps around functions are no graph.
COMPILE = """
import sys, torch
from models.layers import compile_blocks
from tests.test_networks import debug, inputs, predict, randomise
for kind in sys.argv[1:]:
    model = randomise(debug(kind, **({} if kind == "unet" else {"rope": True, "register_tokens": 2})))
    expected = predict(model, **inputs())
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward
    compile_blocks(model, backend=backend)
    for size in ((8, 8), (8, 16), (16, 8)):
        predict(model, **inputs(*size))
    torch.testing.assert_close(predict(model, **inputs()), expected, rtol=1e-5, atol=1e-5)
    print(kind, len(graphs), len(model.blocks))
"""


@pytest.mark.parametrize(
    "kinds", [["dit"], pytest.param(["mmdit", "uvit", "unet"], marks=pytest.mark.slow)], ids=len
)
def test_every_block_compiles_whole_and_predicts_the_same(kinds):
    done = run("-c", COMPILE, *kinds)
    assert done.returncode == 0, done.stderr
    for line, kind in zip(done.stdout.splitlines(), kinds, strict=True):
        name, graphs, blocks = line.split()
        # A graph for each sort of block, once for one shape and once for all: not one a block and shape.
        assert name == kind
        assert 0 < int(graphs) < 3 * int(blocks)


def test_a_dit_of_i1s_parts_is_the_forward_written_out():
    model: Any = randomise(debug("dit", **I1))
    given = inputs()
    mask = given["text_mask"][:, None, None]
    text = model.caption_projection(given["text_emb"])
    for block in model.text_blocks:
        text = text + block.attn(block.norm1(text), layers.sdpa, mask=mask)
        text = text + block.ff(block.norm2(text))

    def through(block: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + block.after_attention(block.attn1(block.norm(x), layers.sdpa))
        x = x + block.attn2(x, layers.sdpa, text, mask)
        return x + block.after_ff(block.ff(block.norm_ff(x)))

    first, middle, last = model.transformer_blocks
    early = through(first, model.embed(given["x_t"])[0])
    late = torch.cat([through(middle, early), early], dim=-1)
    out = model.proj_out(model.norm_out(through(last, last.skip_linear(late))))
    expected = layers.unpatchify(out, 2, 8, 8)
    torch.testing.assert_close(predict(model, **given), expected, rtol=1e-5, atol=1e-5)
    assert not any("norm1.linear" in name or "embed" in name for name in model.state_dict())


@pytest.mark.parametrize(("kind", "options"), RECIPES[:2])
def test_routing_that_leaves_no_patch_out_changes_nothing(kind, options):
    """Patches, their turns and their long skips come back to where they were."""
    plain = randomise(debug(kind, **options, register_tokens=2))
    routing = {"ratio": 0.05, "start": 1, "end": -1}
    routed = randomise(debug(kind, **options, register_tokens=2, routing=routing))
    scores = torch.rand(3, 16)
    found = predict(routed, **inputs(), token_scores=scores)
    torch.testing.assert_close(found, predict(plain, **inputs()))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_rope_turns_with_distance_alone(kind):
    """A picture of one pattern, moved by a patch each way, gives attention the same inner products."""
    q, k = torch.randn(2, 1, 1, 1, 32)
    rope = layers.rope_2d(4, 6, 32, torch.device("cpu"))
    q, k = (layers.rotate(x.expand(1, 24, 1, 32), rope)[0, :, 0] for x in (q, k))
    at = lambda row, column: row * 6 + column  # noqa: E731
    products = [float(q[at(r, c)] @ k[at(r + 1, c + 2)]) for r in range(3) for c in range(4)]
    assert max(products) - min(products) < 1e-5  # fp32 rounding
    assert abs(products[0] - float(q[0] @ k[0])) > 1e-3


@pytest.mark.parametrize("rope", [False, True])
def test_a_network_trains_at_a_size_that_it_first_saw_while_sampling(rope):
    model = randomise(debug("dit", rope=rope))
    with torch.inference_mode():
        predict(model, **inputs(20, 4))
    predict(model, **inputs(20, 4)).sum().backward()


def test_registers_are_rotated_nowhere():
    x = torch.randn(1, 9, 2, 8)
    turned = layers.rotate(x, layers.rope_2d(2, 3, 8, torch.device("cpu")))
    assert torch.equal(turned[:, 6:], x[:, 6:])
    assert not torch.equal(turned[:, 1:6], x[:, 1:6])


def test_patches_come_back_where_they_were():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(layers.unpatchify(layers.patchify(x, 2), 2, 8, 12), x)
    # Row-major patches; the second token is the patch to the right of the first.
    assert torch.equal(layers.patchify(x, 2)[:, 1, 0], x[:, :, 0, 2][:, 0])


# Millions of parameters as published: DiT table 1 with 1000 classes, U-ViT table 1 (ImageNet 256), SD3 as
# released, SD 1.5 and SDXL as released.
PUBLISHED = [
    (DiTConfig(size="XL", latent_channels=4, text_dim=0, pooled_dim=0, num_classes=1000), 675),
    (DiTConfig(size="B", latent_channels=4, text_dim=0, pooled_dim=0, num_classes=1000), 130),
    (UViTConfig(size="L", latent_channels=4, num_classes=1000), 287),
    (UViTConfig(size="H", latent_channels=4, num_classes=1000), 501),
    (
        MMDiTConfig(
            size="sd3", latent_channels=16, text_dim=4096, pooled_dim=2048, learned_positions=True
        ),
        2084,
    ),
    (UNetConfig(size="sd15", latent_channels=4, text_dim=768), 860),
    (
        UNetConfig(
            size="sdxl",
            latent_channels=4,
            text_dim=2048,
            pooled_dim=1280,
            size_conditioning=True,
            latent_downscale=8,
        ),
        2567,
    ),
]


@pytest.mark.parametrize(("config", "millions"), PUBLISHED, ids=lambda x: str(x)[:9])
def test_sizes_have_the_published_parameter_counts(config, millions):
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: debug("dit", hidden_size=65), "hidden_size: got 65"),
        (lambda: debug("uvit", depth=4), "depth: got 4, expected an odd"),
        (lambda: debug("mmdit", text_dim=0), "text_dim: got none"),
        (lambda: debug("unet", text_dim=0), "text_dim: got none"),
        (lambda: debug("dit", latent_channels=None), "latent_channels: missing"),
        (lambda: debug("unet", pooled_dim=0, size_conditioning=True), "pooled_dim"),
        (lambda: debug("dit", rope=True, position_extent=32), "no effect with rope"),
        (lambda: debug("mmdit", rope=True, learned_positions=True), "no effect with rope"),
        (lambda: debug("mmdit", rope=True, text_rope=True), "no effect with rope"),
        (lambda: debug("dit", long_skips=True), "depth: got 2, expected an odd"),
        (lambda: debug("mmdit", modulation="none"), "pooled_dim has no effect"),
        (lambda: debug("dit", **I1, masking={}), "long_skips and masking"),
        (
            lambda: debug("dit", **I1, routing={"start": 0, "end": -1}).config.span,
            "end: got 2 of 3 blocks, expected 3",
        ),
    ],
)
def test_a_config_that_cannot_be_built_says_why(make, message):
    with pytest.raises((InputError, ValueError), match=message):
        make()


def test_a_latent_beyond_the_grid_of_positions_is_an_error():
    for learned in (False, True):
        with pytest.raises(ValueError, match="at most 4 per side"):
            predict(debug("mmdit", position_grid=4, learned_positions=learned), **inputs(8, 16))


@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_matrices_are_those_between_features_inside_blocks(kind):
    model = debug(kind, **ALL)
    roles = parameter_roles(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    hidden = {name for name, role in roles.items() if role.hidden}
    assert set(roles) == set(shapes)
    ends = ("proj_out.w", "norm1.linear", "embed", "conv", "registers", "time_emb")
    inside = ("to_q.", "to_k.", "to_v.", "to_out.", "net.0.", "net.2.")
    assert not any(end in name for end in ends for name in hidden if "block" not in name)
    for name, shape in shapes.items():
        if name.endswith(".weight") and any(part in name for part in inside):
            assert name in hidden
        if len(shape) != 2 or "norm1.linear" in name or "time_emb_proj" in name:
            assert name not in hidden
        if len(shape) < 2 or "class_embed" in name:
            assert not roles[name].decay


@pytest.mark.slow
def test_the_table_of_sizes_is_what_torch_counts():
    table = (ROOT / "models" / "README.md").read_text().splitlines()
    for row in sizes.rows():
        assert row in table


@pytest.mark.parametrize("kind", ["dit", "mmdit", "uvit"])
def test_patches_pass_through_the_bottleneck_alone(kind):
    model = debug(kind, patch_bottleneck=3)
    narrow, wide = model.proj_in
    assert (narrow.weight.shape, narrow.bias) == ((3, 16), None)
    assert wide.weight.shape == (model.dim, 3)
    patches = torch.randn(5, 16)
    expected = patches @ narrow.weight.T @ wide.weight.T + wide.bias
    torch.testing.assert_close(model.proj_in(patches), expected)
    with pytest.raises(InputError, match=r"patch_bottleneck|no class for"):
        layout_of(model.config)
