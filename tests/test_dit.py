"""DiT: shapes, conditioning, initialisation, and that time stays fp32."""

import pytest
import torch

from models import build_model, layers
from models.config import InputError
from models.dit import SIZES, DiT, DiTConfig

TEXT = {"latent_channels": 4, "text_dim": 12, "pooled_dim": 6}


def debug(**options) -> DiT:
    return build_model(DiTConfig(size="debug", **{**TEXT, **options}))


def randomise(model: torch.nn.Module) -> None:
    """Weights that hide nothing behind a zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


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


@pytest.mark.parametrize("modulation", ["block", "shared"])
def test_an_untrained_network_returns_exactly_zero(modulation):
    assert debug(modulation=modulation)(**inputs()).abs().max() == 0


@pytest.mark.parametrize(
    "options", [{}, {"modulation": "shared"}, {"qk_norm": True}, {"patch_size": 4}]
)
@pytest.mark.parametrize("size", [(8, 8), (8, 16), (12, 4)])
def test_the_prediction_has_the_shape_of_the_latents(options, size):
    model = debug(**options)
    randomise(model)
    out = model(**inputs(*size))
    assert out.shape == (3, 4, *size)
    assert out.isfinite().all()


def test_a_latent_that_the_patch_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"7x8.*patch_size 2"):
        debug()(**inputs(7, 8))


def test_patches_come_back_where_they_were():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(layers.unpatchify(layers.patchify(x, 2), 2, 8, 12), x)
    # Row-major patches; the second token is the patch to the right of the first.
    assert torch.equal(layers.patchify(x, 2)[:, 1, 0], x[:, :, 0, 2][:, 0])


@pytest.mark.parametrize("name", ["t", "text_emb", "text_mask", "pooled", "micro", "label", "x_t"])
def test_each_condition_that_the_config_has_reaches_the_output(name):
    model = debug(size_conditioning=True, num_classes=3)
    randomise(model)
    given = inputs()
    before = model(**given)
    changed = {
        "text_mask": torch.arange(5) < torch.tensor([[4], [3], [5]]),
        "label": given["label"].roll(1),
        "micro": given["micro"] + torch.tensor([0.0, 64.0, 0.0, 0.0]),
    }
    given[name] = changed.get(name, given[name].roll(1, -1))
    assert (model(**given) - before).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_tokens_behind_the_mask_change_nothing():
    model = debug()
    randomise(model)
    given = inputs()
    before = model(**given)
    given["text_emb"] = given["text_emb"].masked_fill(~given["text_mask"][..., None], 1e3)
    torch.testing.assert_close(
        model(**given), before, rtol=0, atol=1e-6
    )  # masked weights are e^-inf


def test_padding_text_further_changes_nothing_but_rounding():
    model = debug()
    randomise(model)
    given = inputs()
    before = model(**given)
    given["text_emb"] = torch.nn.functional.pad(given["text_emb"], (0, 0, 0, 4), value=7.0)
    given["text_mask"] = torch.nn.functional.pad(given["text_mask"], (0, 4))
    torch.testing.assert_close(
        model(**given), before, rtol=0, atol=1e-5
    )  # another order of summing


def test_a_condition_that_the_network_needs_cannot_be_left_out():
    given = inputs()
    del given["pooled"]
    with pytest.raises(ValueError, match="pooled"):
        debug()(**given)


def test_time_in_lower_precision_is_refused_and_fp32_time_survives_a_bf16_network():
    model = debug().bfloat16()
    randomise(model)
    given = inputs() | {"t": torch.tensor([0.5000, 0.5005, 0.5010])}
    with pytest.raises(TypeError, match="float32"):
        model(**given | {"t": given["t"].bfloat16()})
    # In bf16 the three times are one; their sinusoids in fp32 are far apart.
    rows = layers.sinusoid(1000 * given["t"], 256)
    assert (rows[0] - rows[1]).abs().max() > 0.3
    assert given["t"].bfloat16().unique().numel() == 1
    given = {k: v[:1].expand(3, *v.shape[1:]) if k != "t" else v for k, v in given.items()}
    out = model(**given)
    assert (out[0] - out[2]).abs().max() > 0


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = debug(gradient_checkpointing=checkpointing)
        randomise(model)
        model(**inputs()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_backend_that_does_not_run_here_falls_back_with_a_line():
    layers.attention_backend.cache_clear()
    if torch.cuda.is_available():
        pytest.skip("xformers may run here")
    with pytest.warns(UserWarning, match="attention backend xformers: .*using sdpa"):
        run = layers.attention_backend("xformers", "cpu", torch.float32)
    assert run is layers.sdpa


@pytest.mark.gpu
def test_xformers_agrees_with_sdpa():
    q = torch.randn(2, 33, 4, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 21, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = (torch.arange(21, device="cuda") < torch.tensor([[9], [21]], device="cuda"))[
        :, None, None
    ]
    run = layers.attention_backend("xformers", "cuda", torch.bfloat16)
    assert run is layers.xformers
    expected = layers.sdpa(q, k, v, mask)
    torch.testing.assert_close(run(q, k, v, mask), expected, rtol=0, atol=2e-2)  # bf16 rounding


def test_sizes_of_the_paper_have_its_parameter_counts():
    # DiT-XL/2's 675 M with class conditioning (2212.09748, table 1).
    with torch.device("meta"):
        model = DiT(
            DiTConfig(size="XL", latent_channels=4, text_dim=0, pooled_dim=0, num_classes=1000)
        )
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(675, rel=0.01)
    assert SIZES["XL"] == (1152, 28, 16)


def test_a_width_that_the_heads_do_not_divide_is_named():
    with pytest.raises(InputError, match="hidden_size: got 65"):
        debug(hidden_size=65)
