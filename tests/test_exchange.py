"""Exchange of weights: the reference classes compute the same, stock pipelines draw the same pictures."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import exchange, layers
from models.conditions import Conditions
from models.config import InputError
from models.networks import DiTConfig, MMDiTConfig, UNetConfig, UViTConfig, build_model
from models.text_conventions import View
from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from pipeline.objectives.config import ObjectiveConfig, SamplerConfig
from pipeline.objectives.objective import Objective
from pipeline.objectives.sampling import Guidance, generate
from tests.test_networks import predict

VAE = Path(__file__).parent.parent / "models" / "demo_vae"
DDIM = {"clip_sample": False, "steps_offset": 1}  # what Stable Diffusion's pipeline insists on
TEXT = {"latent_channels": 4, "text_dim": 16, "pooled_dim": 0}
DIT = DiTConfig(
    size="debug",
    latent_channels=4,
    text_dim=0,
    pooled_dim=0,
    num_classes=5,
    timestep_shift=1,
    position_extent=4.0,
)
PIXART = DiTConfig(size="debug", modulation="shared", position_extent=4.0, **TEXT)
SD3 = MMDiTConfig(size="debug", position_grid=12, position_extent=4.0, **TEXT | {"pooled_dim": 16})
SD35 = SD3.model_copy(update={"qk_norm": True, "dual_attention_layers": 1, "depth": 3})
LEARNED = SD3.model_copy(update={"learned_positions": True})
SD15 = UNetConfig(size="debug", **TEXT)
SDXL = UNetConfig(
    size="debug", size_conditioning=True, latent_downscale=8, **TEXT | {"pooled_dim": 16}
)
PAIRS = {
    "dit": DIT,
    "pixart": PIXART,
    "sd3": SD3,
    "sd3.5": SD35,
    "learned": LEARNED,
    "sd15": SD15,
    "sdxl": SDXL,
}


def random_model(config: Any, seed: int = 0) -> nn.Module:
    """No weight is zero, and none so large that rounding would be."""
    model, generator = build_model(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model.eval()


def inputs(config: Any, height: int, width: int, tokens: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    given = {"x_t": torch.randn(3, 4, height, width, generator=g), "t": torch.rand(3, generator=g)}
    if config.text_dim:
        given["text_emb"] = torch.randn(3, tokens, config.text_dim, generator=g)
    if config.pooled_dim:
        given["pooled"] = torch.randn(3, config.pooled_dim, generator=g)
    if config.num_classes:
        given["label"] = torch.tensor([0, 5, 2])
    if config.size_conditioning:
        given["micro"] = torch.tensor([[300.0, 200.0, 8.0, 0.0]]).expand(3, 4)
    return given


def reference(network: nn.Module, x_t: Tensor, t: Tensor, **given: Any) -> Tensor:
    """The reference class called as its pipeline calls it."""
    text, mask = given.get("text_emb"), given.get("text_mask")
    if isinstance(network, diffusers.DiTTransformer2DModel):
        tokens: list[Tensor] = []
        hook = network.proj_out_2.register_forward_hook(lambda _, __, out: tokens.append(out))
        network(x_t, timestep=1000 * t, class_labels=given["label"])
        hook.remove()
        # What it makes of them is wrong where the latent is not square.
        return layers.unpatchify(tokens[0], 2, *x_t.shape[-2:])
    if isinstance(network, diffusers.PixArtTransformer2DModel):
        return network(x_t, text, 1000 * t, encoder_attention_mask=mask, return_dict=False)[0]
    if isinstance(network, diffusers.SD3Transformer2DModel):
        return network(x_t, text, given["pooled"], 1000 * t, return_dict=False)[0]
    added = None
    if "micro" in given:
        target = torch.tensor([8.0 * side for side in x_t.shape[-2:]]).expand(len(x_t), 2)
        ids = torch.cat([given["micro"], target], dim=1)
        added = {"text_embeds": given["pooled"], "time_ids": ids}
    options = {"encoder_attention_mask": mask, "added_cond_kwargs": added, "return_dict": False}
    return network(x_t, 1000 * t, text, **options)[0]


def assert_close(ours: Tensor, theirs: Tensor, what: str = "", floor: float = 1e-6) -> None:
    """fp32 rounding: other kernels and orders of summing, relative to the largest value."""
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(floor)
    assert error < 5e-5, f"{what}: {error:.1e}"


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for key, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[key], value), key


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", [(8, 8), (4, 16)])
def test_the_reference_class_computes_the_same_outputs_and_gradients(name, size):
    config = PAIRS[name]
    model = random_model(config)
    network = exchange.to_diffusers(model, sample_size=8)
    given = inputs(config, *size)
    given["x_t"].requires_grad_()
    target = torch.randn(3, 4, *size)
    gradients, outputs = [], []
    for run in (lambda: predict(model, **given), lambda: reference(network, **given)):
        outputs.append(run())
        (outputs[-1] * target).mean().backward()
        gradients.append(given["x_t"].grad)
        given["x_t"].grad = None
    assert outputs[0].abs().max() > 0.01
    assert_close(*outputs)
    assert_close(*gradients)
    layout = exchange.layout_of(config)
    theirs = dict(network.named_parameters())
    # A key's bias moves all scores alike, so that its gradient is rounding and nothing else.
    floor = 1e-2 * max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for key, parameter in model.named_parameters():
        places = exchange.places(key, layout, len(model.blocks))
        if places[0][0] not in theirs:
            assert key == "position_table"  # a buffer there
            continue
        parts = [theirs[place].grad for place, _ in places]
        # A copy per block there, one here: the gradients add up.
        total = sum(part for part in parts if part is not None)
        assert isinstance(total, Tensor), key
        assert parameter.grad is not None
        assert_close(parameter.grad, exchange.to_ours(key, total, parameter, 4), key, floor)


@pytest.mark.parametrize("name", ["pixart", "sd15", "sdxl"])
def test_masked_text_is_the_references_masked_text(name):
    model = random_model(PAIRS[name])
    given = inputs(PAIRS[name], 8, 4)
    given["text_mask"] = torch.arange(5) < torch.tensor([[2], [5], [3]])
    assert_close(predict(model, **given), reference(exchange.to_diffusers(model, 8), **given))


@pytest.mark.parametrize("name", ["sd3", "sd3.5"])
def test_masked_text_is_what_a_class_without_masks_makes_of_shorter_text(name):
    model = random_model(PAIRS[name])
    given = inputs(PAIRS[name], 8, 4)
    short = given | {"text_emb": given["text_emb"][:, :3]}
    masked = predict(model, **given, text_mask=(torch.arange(5) < 3).expand(3, 5))
    assert_close(masked, reference(exchange.to_diffusers(model), **short))


@pytest.mark.parametrize("name", PAIRS)
def test_weights_come_back_from_a_folder_as_they_went(name, tmp_path):
    model, other = random_model(PAIRS[name]), random_model(PAIRS[name], seed=1)
    exchange.to_diffusers(model, sample_size=8).save_pretrained(tmp_path)
    exchange.load_weights(other, tmp_path)
    assert_same_weights(other, model)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_folders_under_the_class_name_of_the_released_checkpoints_load(name, tmp_path):
    model, other = random_model(PAIRS[name]), random_model(PAIRS[name], seed=1)
    exchange.to_diffusers(model, sample_size=8).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    released = {"_class_name": "Transformer2DModel", "double_self_attention": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | released))
    exchange.load_weights(other, tmp_path)
    assert_same_weights(other, model)


def facebook_keys(depth: int) -> set[str]:
    """Parameters and buffers of facebookresearch/DiT's models.py."""
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    modules += ["final_layer.adaLN_modulation.1"]
    modules += [f"blocks.{i}.{part}" for i in range(depth) for part in block]
    both = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return both | {"pos_embed", "y_embedder.embedding_table.weight"}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_original_dit_layout_is_covered_both_ways(ending, tmp_path):
    config = DIT.model_copy(update={"timestep_shift": 0, "position_extent": None})
    model, other = random_model(config), random_model(config, seed=1)
    weights = exchange.export_weights(model, exchange.FACEBOOK, sample_size=8)
    assert weights.keys() == facebook_keys(2)
    assert weights["blocks.1.attn.qkv.weight"].shape == (192, 64)
    assert weights["x_embedder.proj.weight"].shape == (64, 4, 2, 2)
    # Released checkpoints predict variances too: (patch row, patch column, channel), the last 4 dropped.
    for kind in ("weight", "bias"):
        out = weights[f"final_layer.linear.{kind}"].unflatten(0, (4, 4))
        weights[f"final_layer.linear.{kind}"] = torch.cat([out, out + 1], dim=1).flatten(0, 1)
    path = tmp_path / f"DiT.{ending}"
    save_file(weights, path) if ending == "safetensors" else torch.save(weights, path)
    exchange.load_weights(other, path)
    assert_same_weights(other, model)


def test_our_own_weights_load_from_a_file(tmp_path):
    config = UViTConfig(size="debug", **TEXT)
    model, other = random_model(config), random_model(config, seed=1)
    save_file(model.state_dict(), tmp_path / "ema.safetensors")
    exchange.load_weights(other, tmp_path / "ema.safetensors")
    assert_same_weights(other, model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PIXART.model_copy(update={"depth": 3}), "num_layers got 2.*is 3"),
        (PIXART.model_copy(update={"text_dim": 8}), "caption_channels got 16.*is 8"),
        (PIXART.model_copy(update={"position_extent": 8.0}), "model.position_extent=4.0"),
        (PIXART.model_copy(update={"pooled_dim": 8}), "model.pooled_dim: got 8.*no place"),
        (
            PIXART.model_copy(update={"position_extent": None}),
            "model.position_extent: got None.*need",
        ),
        (PIXART.model_copy(update={"rope": True}), "model.rope: got True.*no place"),
        (PIXART.model_copy(update={"mlp_ratio": 2.0}), "model.mlp_ratio: got 2.0"),
        (DIT, "_class_name got 'PixArtTransformer2DModel', expected DiTTransformer2DModel"),
        (UViTConfig(size="debug", **TEXT), "uvit, which diffusers has no class for"),
    ],
)
def test_a_folder_of_another_network_is_refused_with_the_difference(config, message, tmp_path):
    exchange.to_diffusers(random_model(PIXART), sample_size=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        exchange.load_weights(build_model(config), tmp_path)


def test_a_folder_that_lacks_a_weight_is_refused_with_its_name(tmp_path):
    exchange.to_diffusers(random_model(DIT), sample_size=8).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out_2.bias"]
    save_file(weights, path)
    with pytest.raises(
        InputError, match=r"not those of its config.json: proj_out_2\.bias is missing"
    ):
        exchange.load_weights(build_model(DIT), tmp_path)


def test_weights_that_are_not_the_models_are_refused_with_their_name(tmp_path):
    model, path = random_model(DIT), tmp_path / "weights.safetensors"
    whole = model.state_dict()

    def refused(weights: dict[str, Tensor], message: str) -> None:
        save_file(weights, path)
        with pytest.raises(InputError, match=message):
            exchange.load_weights(model, path)

    refused({k: v for k, v in whole.items() if k != "proj_out.bias"}, "lacks proj_out.bias")
    refused(whole | {"more": torch.zeros(1)}, "more has no place")
    refused(whole | {"proj_out.bias": torch.zeros(3)}, r"proj_out.bias got shape \(3,\)")
    for broken in (path, path.with_suffix(".pt")):
        broken.write_bytes(b"no weights")
        with pytest.raises(InputError, match="cannot read weights"):
            exchange.load_weights(model, broken)


def test_the_original_dits_weights_in_another_network_are_refused(tmp_path):
    weights = exchange.export_weights(random_model(DIT), exchange.FACEBOOK, sample_size=8)
    save_file(weights, tmp_path / "DiT.safetensors")
    with pytest.raises(
        InputError, match=r"model\.text_dim: got 16, which facebookresearch/DiT has no"
    ):
        exchange.load_weights(random_model(SD15), tmp_path / "DiT.safetensors")


def test_embedders_that_differ_from_block_to_block_are_refused(tmp_path):
    network = exchange.to_diffusers(random_model(DIT), sample_size=8)
    with torch.no_grad():
        network.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.add_(1)
    network.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="differs from block to block"):
        exchange.load_weights(build_model(DIT), tmp_path)


def test_a_position_table_that_was_trained_needs_a_trained_one_here(tmp_path):
    exchange.to_diffusers(random_model(LEARNED)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.learned_positions=true"):
        exchange.load_weights(build_model(SD3), tmp_path)


# --- pipelines ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(text_folder):
    """A caption as the tiny text encoder gives it, unpadded: tokens (1, L, 16), mask, pooled (1, 16)."""
    return TextEncoder(text_folder, View(max_length=8)).encode(["a red apple"])


def stock(config: Any, folder: Path) -> tuple[nn.Module, Any, Any, Tensor]:
    """Our model; what a stock pipeline opens of it; the VAE; and the noise that both begin with."""
    model = random_model(config)
    exchange.to_diffusers(model, sample_size=8).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["_class_name"]
    network = getattr(diffusers, exchange.layout_of(config)).from_pretrained(folder)
    vae = diffusers.AutoencoderKL.from_pretrained(VAE)
    return model, network.eval(), vae, torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))


@torch.no_grad()
def by_hand(model: nn.Module, vae: Any, noise: Tensor, **given: Tensor) -> np.ndarray:
    """DDIM with our network as the predictor of noise; pictures (1, H, W, 3) in [0, 1]."""
    scheduler, x = diffusers.DDIMScheduler(**DDIM), noise
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        pred = predict(model, x, (timestep / 1000).expand(1).float(), **given)
        x = scheduler.step(pred, timestep, x).prev_sample
    pictures = vae.decode(x / vae.config.scaling_factor).sample
    return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.std() > 0.01
    assert np.abs(ours - theirs).max() < 1e-4  # fp32 rounding through 3 steps and the decoder


def test_the_dit_pipeline_draws_our_picture(tmp_path):
    model, network, vae, _ = stock(DIT, tmp_path)
    pipeline = diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler(**DDIM))
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
    theirs = pipeline([2], generator=torch.manual_seed(3), **options).images
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
    assert_same_picture(by_hand(model, vae, noise, label=torch.tensor([2])), theirs)


@pytest.mark.parametrize("name", ["pixart", "sd15", "sdxl"])
def test_a_text_pipeline_draws_our_picture(name, encoded, tmp_path):
    tokens, mask, pooled = encoded
    model, network, vae, noise = stock(PAIRS[name], tmp_path)
    parts: dict[str, Any] = {"vae": vae, "scheduler": diffusers.DDIMScheduler(**DDIM)}
    parts |= {"text_encoder": None, "tokenizer": None}
    options: dict[str, Any] = {"prompt_embeds": tokens}
    given = {"text_emb": tokens, "text_mask": mask}
    if name == "pixart":
        pipeline: Any = diffusers.PixArtAlphaPipeline(transformer=network, **parts)
        options |= {"prompt_attention_mask": mask, "negative_prompt": None}
        options |= {"use_resolution_binning": False}
    elif name == "sd15":
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipeline = diffusers.StableDiffusionPipeline(
            unet=network, requires_safety_checker=False, **parts
        )
    else:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        pipeline = diffusers.StableDiffusionXLPipeline(unet=network, add_watermarker=False, **parts)
        options |= {"pooled_prompt_embeds": pooled, "original_size": (32, 32)}
        options |= {"target_size": (64, 64)}
        given |= {"pooled": pooled, "micro": torch.tensor([[32.0, 32.0, 0.0, 0.0]])}
    pipeline.set_progress_bar_config(disable=True)
    side = 8 * 2 ** (len(vae.config.block_out_channels) - 1)
    options |= {"height": side, "width": side, "latents": noise, "guidance_scale": 1.0}
    theirs = pipeline(num_inference_steps=3, output_type="np", **options).images
    assert_same_picture(by_hand(model, vae, noise, **given), theirs)


def test_the_sd3_pipeline_draws_what_our_sampler_and_codec_draw(encoded, tmp_path):
    tokens, mask, pooled = encoded
    model, network, vae, noise = stock(SD3, tmp_path)
    nothing = {
        f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.StableDiffusion3Pipeline(network, scheduler, vae, **nothing)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        latents=noise,
        height=32,
        width=32,
        sigmas=[1.0, 2 / 3, 1 / 3],
        guidance_scale=1.0,
        output_type="np",
    ).images
    objective = Objective(ObjectiveConfig())  # SD3's
    given = Guidance(Conditions(tokens, mask, pooled))
    latents = generate(model, objective, noise, given, SamplerConfig(num_steps=3))
    ours = LatentCodec(VAE).decode(latents).permute(0, 2, 3, 1).numpy()
    assert ours.std() > 2
    # A difference in rounding to 8 bits.
    assert np.abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1
