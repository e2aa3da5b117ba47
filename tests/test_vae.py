"""The latent codec against diffusers itself, and every folder that is not a whole codec."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from data_prep.schema import CodecRecord
from models.codec_layouts import Normalisation
from models.config import InputError
from models.vae import LatentCodec, sample_latents, to_uint8
from models.weights import weights_sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_kl(folder: Path, **options) -> Path:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        **{"scaling_factor": 0.7, "shift_factor": 0.1, "force_upcast": False, **options},
    ).save_pretrained(folder)
    return folder


def save_tiny(folder: Path) -> Path:
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**widths).save_pretrained(folder)
    return folder


def save_dc(folder: Path) -> Path:
    sides = {f"{s}_block_out_channels": (8, 16, 16) for s in ("encoder", "decoder")}
    layers = {f"{s}_layers_per_block": (1, 1, 1) for s in ("encoder", "decoder")}
    kinds = {f"{s}_block_types": "ResBlock" for s in ("encoder", "decoder")}
    AutoencoderDC(
        latent_channels=8, scaling_factor=0.4, **sides, **layers, **kinds
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory) -> Path:
    return save_kl(tmp_path_factory.mktemp("codec") / "kl")


@pytest.fixture
def images() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=rng)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_moments_are_near_those_of_fp32_and_come_as_fp32(kl_folder, images, dtype):
    exact = LatentCodec(kl_folder).encode_moments(images)
    half = LatentCodec(kl_folder, dtype).encode_moments(images)
    assert half.dtype == torch.float32
    # bf16 keeps 8 bits: 2^-8 per layer over some ten layers
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(half, exact)


def test_latents_are_sampled_then_shifted_then_scaled():
    mean, std = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 0.5)
    moments = torch.cat([mean, std], dim=1).half()
    noise = torch.full((1, 1, 1, 1), 2.0)
    normalisation = Normalisation(mean=(1.0,), std=(0.1,))
    latents = sample_latents(moments, noise, normalisation)
    assert latents.item() == ((3.0 + 0.5 * 2.0) - 1.0) * 10.0
    assert latents.dtype == torch.float32
    still = sample_latents(moments[:, :1], noise, normalisation)
    assert still.item() == (3.0 - 1.0) * 10.0


def test_latents_by_std_are_bit_for_bit_those_by_scaling_factor(tmp_path):
    """So that golden step and curves stay: of scales in use, the demo's, and a thousand others."""
    demo = LatentCodec(Path(__file__).parent.parent / "models" / "demo_vae")
    own = demo.network.config
    scales = torch.rand(1000, dtype=torch.float64, generator=torch.manual_seed(0)).mul(3).tolist()
    pairs = [(0.18215, 0.0), (0.13025, 0.0), (1.5305, 0.0609), (0.3611, 0.1159), (0.41407, 0.0)]
    moments, still = torch.randn(1, 4, 16, 16).half(), torch.zeros(1, 4, 16, 16)
    for scale, shift in pairs + [(scale, scale / 7) for scale in scales]:
        per_channel = Normalisation(mean=(shift,) * 4, std=(1 / scale,) * 4)
        latents = sample_latents(moments, still, per_channel)
        assert torch.equal(latents, (moments.float() - shift) * scale), (scale, shift)
    latents = sample_latents(moments, still, demo.normalisation)
    expected = (moments.float() - own.shift_factor) * own.scaling_factor
    assert torch.equal(latents, expected)


def test_moments_that_do_not_fit_the_noise_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        sample_latents(
            torch.zeros(1, 8, 2, 2), torch.zeros(1, 3, 2, 2), Normalisation(mean=(0.0,), std=(1.0,))
        )


def test_every_uint8_value_survives_the_way_to_pixels_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values.float() / 127.5 - 1), values)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_a_picture_whose_sides_do_not_divide_by_the_downscale_is_refused(kl_folder):
    with pytest.raises(ValueError, match="must divide by 4"):
        LatentCodec(kl_folder).encode_moments(torch.zeros(1, 3, 32, 30, dtype=torch.uint8))


def test_the_record_has_the_fields_of_the_manifest_and_the_hash_of_the_weights(kl_folder):
    record = CodecRecord.model_validate(LatentCodec(kl_folder, "bf16").record())
    assert record.weights_sha256 == hashlib.sha256((kl_folder / WEIGHTS).read_bytes()).hexdigest()
    assert (record.class_name, record.channels) == ("AutoencoderKL", 4)
    assert (record.downscale, record.dtype) == (4, "bf16")
    assert record.normalisation == Normalisation(mean=(0.1,) * 4, std=(1 / 0.7,) * 4)


TWINS = {
    "variant": lambda codec, folder: codec.network.half().save_pretrained(folder, variant="fp16"),
    "copy": lambda codec, folder: save_file({"x": torch.zeros(2)}, folder / "a_copy.safetensors"),
}


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_the_weights_hash_is_of_the_files_that_are_loaded_and_of_no_other(tmp_path, shard, twin):
    codec = LatentCodec(save_kl(tmp_path / "kl"))
    folder = tmp_path / "saved"
    codec.network.save_pretrained(folder, max_shard_size=shard)
    before, loaded = weights_sha256(folder), set(folder.glob("*.safetensors"))
    assert (len(loaded) > 1) is (shard == "20KB")
    expected = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(loaded))).hexdigest()
    TWINS[twin](codec, folder)
    assert weights_sha256(folder) == before == expected
    for path in sorted(folder.glob("*.safetensors")):
        aside = path.rename(path.with_suffix(".aside"))
        if path in loaded:
            with pytest.raises(InputError, match=r"no such file|expected model\.safetensors"):
                weights_sha256(folder)
            with pytest.raises(InputError):
                LatentCodec(folder)
        else:
            assert weights_sha256(folder) == before
            LatentCodec(folder)
        aside.rename(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_an_index_of_weights_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"{path}: not an index of weights"):
        weights_sha256(tmp_path)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["decoder.conv_in.bias"]
    save_file(weights, folder / WEIGHTS)


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:2000])


@pytest.mark.parametrize(
    ("spoil", "dtype", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "fp32", "config.json: no such file"),
        (lambda f: (f / "config.json").write_text("{"), "fp32", "not valid JSON"),
        (lambda f: (f / WEIGHTS).unlink(), "fp32", "got no weights, expected .*safetensors"),
        (pickle_only, "fp32", "got diffusion_pytorch_model.bin, expected"),
        (truncate, "fp32", "cannot load AutoencoderKL"),
        (drop_a_weight, "fp32", "not those of its config.json: decoder.conv_in.bias is missing"),
        (lambda f: edit_config(f, latent_channels=5), "fp32", "size mismatch"),
        (lambda f: edit_config(f, _class_name="VQModel"), "fp32", "'VQModel', expected one of"),
        (lambda f: edit_config(f, latents_mean=[0.0] * 3), "fp32", "got 3 means and 4 stds"),
        (lambda f: edit_config(f, force_upcast=True), "fp16", "dtype bf16 or fp32"),
    ],
)
def test_a_folder_that_is_no_whole_codec_ends_with_a_message_about_it(
    tmp_path, spoil, dtype, message
):
    folder = save_kl(tmp_path / "kl")
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        LatentCodec(folder, dtype)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_named_and_a_folder_above_the_codec_gets_a_hint(kl_folder):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        LatentCodec(kl_folder / "nowhere")
    with pytest.raises(InputError, match="sub-folder kl"):
        LatentCodec(kl_folder.parent)
